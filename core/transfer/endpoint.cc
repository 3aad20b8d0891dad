// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/endpoint.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/float_cast.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {

absl::StatusOr<std::unique_ptr<DeviceStream>> Endpoint::OpenDeviceStream() {
  return absl::UnimplementedError("this endpoint has no tensors on a device");
}

absl::Status Endpoint::ReadOnDevice(size_t, const Box&, int64_t, int64_t, DType,
                                    DeviceStream&, absl::Span<std::byte>) {
  return absl::UnimplementedError("this endpoint has no tensors on a device");
}

absl::Status Endpoint::WriteOnDevice(size_t, const Box&, int64_t, int64_t,
                                     DType, DeviceStream&,
                                     absl::Span<const std::byte>) {
  return absl::UnimplementedError("this endpoint has no tensors on a device");
}

absl::Status MemoryEndpoint::Add(TensorSpec spec, std::vector<Part> parts) {
  DSD_RETURN_IF_ERROR(catalog_.Add(std::move(spec)));
  parts_.push_back(std::move(parts));
  return absl::OkStatus();
}

absl::Status MemoryEndpoint::AddLocal(TensorSpec spec, Holder holder,
                                      std::byte* local) {
  const Layout& layout = spec.layout;
  const int64_t item_size = ItemSize(spec.dtype);
  const Dims global_strides = RowMajorStrides(layout.shape());
  Dims local_strides;
  if (layout.kind() == Layout::Kind::kMesh) {
    const std::optional<Dims> shape = layout.LocalShape(holder);
    if (shape.has_value()) local_strides = RowMajorStrides(*shape);
  }
  std::vector<Part> parts;
  for (const LocalBox& piece : layout.BoxesOf(holder)) {
    // A box layout packs its boxes one after another, a flat one keeps the
    // distances of the whole tensor.
    const Dims strides = layout.kind() == Layout::Kind::kMesh ? local_strides
                         : layout.kind() == Layout::Kind::kFlat
                             ? global_strides
                             : RowMajorStrides(piece.box.extents());
    int64_t offset = 0;
    for (size_t d = 0; d < piece.local_lo.size(); ++d) {
      offset += piece.local_lo[d] *
                (layout.kind() == Layout::Kind::kFlat ? 1 : strides[d]);
    }
    Part part;
    part.box = piece.box;
    part.view.base = local + offset * item_size;
    for (int64_t stride : strides) {
      part.view.strides_bytes.push_back(stride * item_size);
    }
    if (layout.kind() == Layout::Kind::kBoxes) {
      local += piece.box.num_elements() * item_size;
    }
    parts.push_back(std::move(part));
  }
  return Add(std::move(spec), std::move(parts));
}

std::optional<StridedView> MemoryEndpoint::View(size_t tensor, const Box& box) {
  for (const Part& part : parts_[tensor]) {
    if (!part.box.Contains(box)) continue;
    StridedView view = part.view;
    for (int d = 0; d < box.ndim(); ++d) {
      view.base += (box.lo[d] - part.box.lo[d]) * view.strides_bytes[d];
    }
    return view;
  }
  return std::nullopt;
}

namespace {

absl::Status CheckAccess(const TensorSpec& spec, const Box& box, DType dtype,
                         bool found) {
  if (!found) {
    return absl::InternalError(absl::StrCat("\"", spec.fqn, "\": box ",
                                            box.ToString(),
                                            " is not in this rank's memory"));
  }
  if (dtype != spec.dtype && !(IsCastable(dtype) && IsCastable(spec.dtype))) {
    return absl::UnimplementedError(absl::StrCat(
        "\"", spec.fqn, "\": plain memory cannot be converted between ",
        DTypeName(spec.dtype), " and ", DTypeName(dtype)));
  }
  return absl::OkStatus();
}

// Converted at once, in memory that stays in the cache.
constexpr int64_t kCastElements = 4096;
constexpr int64_t kMaxCastItemBytes = 8;

}  // namespace

absl::Status MemoryEndpoint::Read(size_t tensor, const Box& box, int64_t begin,
                                  int64_t end, DType dtype,
                                  absl::Span<std::byte> out) {
  const std::optional<StridedView> view = View(tensor, box);
  DSD_RETURN_IF_ERROR(
      CheckAccess(catalog_[tensor], box, dtype, view.has_value()));
  const DType stored = catalog_[tensor].dtype;
  if (dtype == stored) {
    PackRange(*view, box.extents(), ItemSize(dtype), begin, end, out.data());
    return absl::OkStatus();
  }
  std::byte packed[kCastElements * kMaxCastItemBytes];
  for (int64_t at = begin; at < end; at += kCastElements) {
    const int64_t until = std::min(end, at + kCastElements);
    PackRange(*view, box.extents(), ItemSize(stored), at, until, packed);
    CastFloats(stored,
               absl::MakeConstSpan(packed, (until - at) * ItemSize(stored)),
               dtype,
               out.subspan((at - begin) * ItemSize(dtype),
                           (until - at) * ItemSize(dtype)));
  }
  return absl::OkStatus();
}

absl::Status MemoryEndpoint::Write(size_t tensor, const Box& box, int64_t begin,
                                   int64_t end, DType dtype,
                                   absl::Span<const std::byte> in) {
  const std::optional<StridedView> view = View(tensor, box);
  DSD_RETURN_IF_ERROR(
      CheckAccess(catalog_[tensor], box, dtype, view.has_value()));
  const DType stored = catalog_[tensor].dtype;
  if (dtype == stored) {
    UnpackRange(*view, box.extents(), ItemSize(dtype), begin, end, in.data());
    return absl::OkStatus();
  }
  std::byte packed[kCastElements * kMaxCastItemBytes];
  for (int64_t at = begin; at < end; at += kCastElements) {
    const int64_t until = std::min(end, at + kCastElements);
    CastFloats(dtype,
               in.subspan((at - begin) * ItemSize(dtype),
                          (until - at) * ItemSize(dtype)),
               stored, absl::MakeSpan(packed, (until - at) * ItemSize(stored)));
    UnpackRange(*view, box.extents(), ItemSize(stored), at, until, packed);
  }
  return absl::OkStatus();
}

}  // namespace dsd
