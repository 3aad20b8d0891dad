// SPDX-License-Identifier: Apache-2.0
//
// One side of a redistribution on one rank: a catalog and the means to touch
// the bytes of this rank's own boxes.

#ifndef DSD_CORE_TRANSFER_ENDPOINT_H_
#define DSD_CORE_TRANSFER_ENDPOINT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/plan/catalog.h"
#include "dsd/core/transfer/device_stream.h"
#include "dsd/core/transfer/strided_view.h"

namespace dsd {

// Thread-compatible. Indices are of catalog(). A box passed in lies inside one
// of this rank's boxes of the tensor (for a tensor on kAnyHolder: anywhere).
class Endpoint {
 public:
  virtual ~Endpoint() = default;

  virtual const Catalog& catalog() const = 0;

  // Copies elements [begin, end) of `box`, counted row-major over the box, as
  // items of type `dtype` into `out`, which has exactly their size.
  // Errors: Unimplemented for a conversion that the endpoint lacks; DataLoss
  // for stored bytes that do not verify; what storage reports.
  virtual absl::Status Read(size_t tensor, const Box& box, int64_t begin,
                            int64_t end, DType dtype,
                            absl::Span<std::byte> out) = 0;

  // The inverse of Read.
  virtual absl::Status Write(size_t tensor, const Box& box, int64_t begin,
                             int64_t end, DType dtype,
                             absl::Span<const std::byte> in) = 0;

  // The box as addressable host memory of the catalog's dtype, or nullopt. A
  // returned view stays valid until the endpoint is destroyed.
  virtual std::optional<StridedView> View(size_t /*tensor*/,
                                          const Box& /*box*/) {
    return std::nullopt;
  }

  // Says that one of this rank's boxes of the tensor is needed soon.
  virtual void Prefetch(size_t /*tensor*/) const {}

  // Whether this rank's part of the tensor is in memory of a device that the
  // host cannot touch. Then View is nullopt, Read and Write are slow, and the
  // next four serve it.
  virtual bool IsOnDevice(size_t /*tensor*/) const { return false; }

  // A stream of its own on the device of such tensors. ResourceExhausted; what
  // the device reports.
  virtual absl::StatusOr<std::unique_ptr<DeviceStream>> OpenDeviceStream();

  // Like View, of memory of the device of `stream`, which this or another
  // endpoint of the same class has opened, to be used in the stream's order.
  virtual std::optional<StridedView> ViewOnDevice(size_t /*tensor*/,
                                                  const Box& /*box*/,
                                                  DeviceStream& /*stream*/) {
    return std::nullopt;
  }

  // Read and Write with memory of the device, enqueued on `stream`, which may
  // hold them back (DeviceStream::Submit).
  virtual absl::Status ReadOnDevice(size_t tensor, const Box& box,
                                    int64_t begin, int64_t end, DType dtype,
                                    DeviceStream& stream,
                                    absl::Span<std::byte> out);
  virtual absl::Status WriteOnDevice(size_t tensor, const Box& box,
                                     int64_t begin, int64_t end, DType dtype,
                                     DeviceStream& stream,
                                     absl::Span<const std::byte> in);

  // Called once when all writes of a transfer have succeeded on this rank.
  virtual absl::Status Finish() { return absl::OkStatus(); }
};

// Tensors in host memory: local tensors or whole ones. An Endpoint for tests,
// examples and code that has plain buffers. It converts between the dtypes of
// CastFloats.
class MemoryEndpoint : public Endpoint {
 public:
  // One box of this rank, at `view`.
  struct Part {
    Box box;
    StridedView view;
  };

  // Adds a tensor of which this rank has `parts` (none is legal). Buffers are
  // borrowed. AlreadyExists for a name that is taken.
  absl::Status Add(TensorSpec spec, std::vector<Part> parts);

  // Adds a tensor whose local tensor (contiguous, as Layout::LocalShape of
  // `holder`; for box layouts the boxes back to back) is at `local`.
  absl::Status AddLocal(TensorSpec spec, Holder holder, std::byte* local);

  const Catalog& catalog() const override { return catalog_; }
  absl::Status Read(size_t tensor, const Box& box, int64_t begin, int64_t end,
                    DType dtype, absl::Span<std::byte> out) override;
  absl::Status Write(size_t tensor, const Box& box, int64_t begin, int64_t end,
                     DType dtype, absl::Span<const std::byte> in) override;
  std::optional<StridedView> View(size_t tensor, const Box& box) override;

 private:
  Catalog catalog_;
  std::vector<std::vector<Part>> parts_;
};

}  // namespace dsd

#endif  // DSD_CORE_TRANSFER_ENDPOINT_H_
