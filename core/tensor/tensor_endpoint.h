// SPDX-License-Identifier: Apache-2.0
//
// Live tensors as one side of a redistribution.

#ifndef DSD_CORE_TENSOR_TENSOR_ENDPOINT_H_
#define DSD_CORE_TENSOR_TENSOR_ENDPOINT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/plan/catalog.h"
#include "dsd/core/tensor/tensor_value.h"
#include "dsd/core/transfer/device_stream.h"
#include "dsd/core/transfer/endpoint.h"

namespace dsd {

// Reads and writes the memory of at::Tensors of any strides, in host memory and
// on CUDA; conversions are those of Tensor::copy_. Holds references to the
// tensors. Autograd is not involved; Finish() tells it (version counters) that
// the tensors were written. Thread-compatible.
class TensorEndpoint : public Endpoint {
 public:
  // Plain tensors are taken to be replicated over the holders of `replicas`, of
  // which this rank is `self`.
  TensorEndpoint(DeviceMesh replicas, Holder self)
      : replicas_(std::move(replicas)), self_(self) {}

  TensorEndpoint(TensorEndpoint&&) = default;
  TensorEndpoint& operator=(TensorEndpoint&&) = default;

  // For `size` tensors in all.
  void Reserve(size_t size);

  // Adds a tensor under a name.
  // Errors: AlreadyExists (name taken); InvalidArgument (undefined, sparse or
  // meta tensor); Unimplemented (element type).
  absl::Status Add(std::string fqn, const TensorValue& value);

  // Adds a tensor with a layout given by the caller, of which this rank has the
  // part of `holder` in `locals` (see TensorValue::locals); none if it has
  // none.
  absl::Status Add(TensorSpec spec, Holder holder,
                   absl::Span<const at::Tensor> locals);

  // The layout that a plain tensor of this shape has here. Kept: models have
  // many tensors of few shapes.
  absl::StatusOr<Layout> ReplicatedLayout(const Dims& shape);

  // For each tensor the first one of its type and layout that is the same
  // memory on this rank, as tied weights are; itself where none is, and where
  // this rank has nothing of it.
  std::vector<size_t> SameMemory() const;

  const Catalog& catalog() const override { return catalog_; }
  absl::Status Read(size_t tensor, const Box& box, int64_t begin, int64_t end,
                    DType dtype, absl::Span<std::byte> out) override;
  absl::Status Write(size_t tensor, const Box& box, int64_t begin, int64_t end,
                     DType dtype, absl::Span<const std::byte> in) override;
  std::optional<StridedView> View(size_t tensor, const Box& box) override;
  void Prefetch(size_t tensor) const override;
  bool IsOnDevice(size_t tensor) const override;
  std::optional<StridedView> ViewOnDevice(size_t tensor, const Box& box,
                                          DeviceStream& stream) override;
  absl::StatusOr<std::unique_ptr<DeviceStream>> OpenDeviceStream() override;
  absl::Status ReadOnDevice(size_t tensor, const Box& box, int64_t begin,
                            int64_t end, DType dtype, DeviceStream& stream,
                            absl::Span<std::byte> out) override;
  absl::Status WriteOnDevice(size_t tensor, const Box& box, int64_t begin,
                             int64_t end, DType dtype, DeviceStream& stream,
                             absl::Span<const std::byte> in) override;
  absl::Status Finish() override;

 private:
  // Where a local tensor is, and whether its values are what is there:
  // lazily conjugated or negated tensors have others.
  struct Memory {
    c10::Device device;
    bool has_values;
    std::byte* base;
    Dims strides_bytes;
  };
  struct Entry {
    Holder holder;
    absl::InlinedVector<at::Tensor, 1> locals;
    bool is_on_device;  // all of them
    // When first asked for, and then kept: a TensorImpl is far away in memory.
    const std::vector<LocalBox>* boxes = nullptr;
    absl::InlinedVector<Memory, 1> memory;  // one for each local tensor
  };

  absl::Span<const LocalBox> BoxesOf(size_t tensor);
  const Memory& MemoryOf(Entry& entry, size_t local);
  // The box where it is in memory of `device` as the catalog says.
  std::optional<StridedView> ViewOn(c10::Device device, size_t tensor,
                                    const Box& box);
  // Calls `fn` with the views, within the local tensors, of elements [begin,
  // end) of `box`, in order.
  template <class Fn>
  absl::Status ForEachView(size_t tensor, const Box& box, int64_t begin,
                           int64_t end, Fn&& fn);

  DeviceMesh replicas_;
  Holder self_;
  absl::flat_hash_map<Dims, Layout> replicated_;
  // What a holder has of a layout, by its symbols: models have many tensors of
  // few layouts.
  absl::flat_hash_map<std::pair<Digest, Holder>,
                      std::unique_ptr<const std::vector<LocalBox>>>
      boxes_;
  Catalog catalog_;
  std::vector<Entry> entries_;
};

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_TENSOR_ENDPOINT_H_
