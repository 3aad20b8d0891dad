// SPDX-License-Identifier: Apache-2.0

#ifndef DSD_FRONTENDS_CHECKPOINT_PATIENT_ENDPOINT_H_
#define DSD_FRONTENDS_CHECKPOINT_PATIENT_ENDPOINT_H_

#include <algorithm>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/transfer/endpoint.h"

namespace dsd::checkpoint {

// A source whose errors wait until all ranks can hear of them: a transfer that
// fails on one rank would break the communicator of all. What could not be read
// is zero. Borrows the source.
class PatientEndpoint final : public Endpoint {
 public:
  explicit PatientEndpoint(Endpoint* source) : source_(*source) {}

  // The first error.
  const absl::Status& status() const { return status_; }

  const Catalog& catalog() const override { return source_.catalog(); }

  absl::Status Read(size_t tensor, const Box& box, int64_t begin, int64_t end,
                    DType dtype, absl::Span<std::byte> out) override {
    if (status_.ok()) {
      status_ = source_.Read(tensor, box, begin, end, dtype, out);
    }
    if (!status_.ok()) std::fill(out.begin(), out.end(), std::byte{0});
    return absl::OkStatus();
  }

  absl::Status Write(size_t, const Box&, int64_t, int64_t, DType,
                     absl::Span<const std::byte>) override {
    return absl::UnimplementedError("a source is not written");
  }

  std::optional<StridedView> View(size_t tensor, const Box& box) override {
    return source_.View(tensor, box);
  }
  bool IsOnDevice(size_t tensor) const override {
    return source_.IsOnDevice(tensor);
  }
  absl::StatusOr<std::unique_ptr<DeviceStream>> OpenDeviceStream() override {
    return source_.OpenDeviceStream();
  }
  std::optional<StridedView> ViewOnDevice(size_t tensor, const Box& box,
                                          DeviceStream& stream) override {
    return source_.ViewOnDevice(tensor, box, stream);
  }
  absl::Status ReadOnDevice(size_t tensor, const Box& box, int64_t begin,
                            int64_t end, DType dtype, DeviceStream& stream,
                            absl::Span<std::byte> out) override {
    return source_.ReadOnDevice(tensor, box, begin, end, dtype, stream, out);
  }

 private:
  Endpoint& source_;
  absl::Status status_;
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_PATIENT_ENDPOINT_H_
