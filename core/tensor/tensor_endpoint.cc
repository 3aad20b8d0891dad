// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/tensor_endpoint.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/core/grad_mode.h"
#include "ATen/ops/from_blob.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/prefetch.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/placement.h"
#include "dsd/core/tensor/local_view.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_device_stream.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {
namespace {

// What is wrong with `tensor` as something with addressable elements.
absl::Status CheckHasElements(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return absl::InvalidArgumentError("the tensor is undefined");
  }
  if (tensor.is_meta()) {
    return absl::InvalidArgumentError(
        "the tensor is on the meta device and has no values; allocate it first "
        "(to_empty)");
  }
  if (tensor.layout() != c10::Layout::Strided) {
    return absl::InvalidArgumentError(
        "the tensor is not dense (sparse layouts are not supported); convert "
        "it "
        "with to_dense()");
  }
  return ToDevice(tensor.device()).status();
}

// The whole of `box` counted row-major from 0: elements [begin, end) as boxes.
std::vector<Box> SubBoxes(const Box& box, int64_t begin, int64_t end) {
  if (begin == 0 && end == box.num_elements()) return {box};
  std::vector<Box> sub_boxes = LowerFlatInterval(box.extents(), begin, end);
  for (Box& sub : sub_boxes) {
    for (int d = 0; d < box.ndim(); ++d) {
      sub.lo[d] += box.lo[d];
      sub.hi[d] += box.lo[d];
    }
  }
  return sub_boxes;
}

}  // namespace

void TensorEndpoint::Reserve(size_t size) {
  catalog_.Reserve(size);
  entries_.reserve(size);
}

absl::Status TensorEndpoint::Add(std::string fqn, const TensorValue& value) {
  if (!value.defined()) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", fqn, "\": the tensor is undefined"));
  }
  const absl::StatusOr<DType> dtype = ToDType(value.scalar_type());
  if (!dtype.ok()) {
    return Annotate(dtype.status(), absl::StrCat("\"", fqn, "\""));
  }
  if (!value.is_plain()) {
    return Add(TensorSpec{std::move(fqn), *dtype, value.layout()},
               value.holder(), value.locals());
  }
  DSD_ASSIGN_OR_RETURN(Layout layout, ReplicatedLayout(value.shape()));
  return Add(TensorSpec{std::move(fqn), *dtype, std::move(layout)}, self_,
             value.locals());
}

absl::Status TensorEndpoint::Add(TensorSpec spec, Holder holder,
                                 absl::Span<const at::Tensor> locals) {
  Entry entry{holder, {}, /*is_on_device=*/!locals.empty()};
  for (const at::Tensor& local : locals) {
    DSD_RETURN_IF_ERROR(CheckHasElements(local)) << "\"" << spec.fqn << "\"";
    entry.is_on_device &= local.is_cuda();
    // Without history; the version counter stays the same.
    const bool has_history =
        local.unsafeGetTensorImpl()->autograd_meta() != nullptr;
    entry.locals.push_back(has_history ? local.tensor_data() : local);
  }
  DSD_RETURN_IF_ERROR(catalog_.Add(std::move(spec)));
  entries_.push_back(std::move(entry));
  return absl::OkStatus();
}

absl::StatusOr<Layout> TensorEndpoint::ReplicatedLayout(const Dims& shape) {
  const auto known = replicated_.find(shape);
  if (known != replicated_.end()) return known->second;
  DSD_ASSIGN_OR_RETURN(Layout layout,
                       Layout::FromPlacements(shape, replicas_, {Replicate()}));
  replicated_.emplace(shape, layout);
  return layout;
}

absl::Span<const LocalBox> TensorEndpoint::BoxesOf(size_t tensor) {
  Entry& entry = entries_[tensor];
  if (entry.locals.empty()) return {};
  if (entry.boxes == nullptr) {
    const Layout& layout = catalog_[tensor].layout;
    auto& known = boxes_[{layout.symbols(), entry.holder}];
    if (known == nullptr) {
      known = std::make_unique<const std::vector<LocalBox>>(
          layout.BoxesOf(entry.holder));
    }
    entry.boxes = known.get();
  }
  return *entry.boxes;
}

template <class Fn>
absl::Status TensorEndpoint::ForEachView(size_t tensor, const Box& box,
                                         int64_t begin, int64_t end, Fn&& fn) {
  const absl::Span<const LocalBox> boxes = BoxesOf(tensor);
  const std::optional<size_t> index = FindBox(boxes, box);
  if (!index.has_value()) {
    return absl::InternalError(absl::StrCat("box ", box.ToString(), " of \"",
                                            catalog_[tensor].fqn,
                                            "\" is not on this rank"));
  }
  return TorchToStatus([&] {
    const at::NoGradGuard no_grad;
    for (const Box& sub : SubBoxes(box, begin, end)) {
      fn(ViewOfBox(catalog_[tensor].layout, entries_[tensor].locals, boxes,
                   *index, sub));
    }
  });
}

absl::Status TensorEndpoint::Read(size_t tensor, const Box& box, int64_t begin,
                                  int64_t end, DType dtype,
                                  absl::Span<std::byte> out) {
  if (dtype == catalog_[tensor].dtype) {
    if (const std::optional<StridedView> view = View(tensor, box)) {
      PackRange(*view, box.extents(), ItemSize(dtype), begin, end, out.data());
      return absl::OkStatus();
    }
  }
  std::byte* at = out.data();
  return ForEachView(tensor, box, begin, end, [&](const at::Tensor& view) {
    at::from_blob(at, view.sizes(), c10::TensorOptions(ToScalarType(dtype)))
        .copy_(view);
    at += view.numel() * ItemSize(dtype);
  });
}

absl::Status TensorEndpoint::Write(size_t tensor, const Box& box, int64_t begin,
                                   int64_t end, DType dtype,
                                   absl::Span<const std::byte> in) {
  if (dtype == catalog_[tensor].dtype) {
    if (const std::optional<StridedView> view = View(tensor, box)) {
      UnpackRange(*view, box.extents(), ItemSize(dtype), begin, end, in.data());
      return absl::OkStatus();
    }
  }
  // from_blob takes no const memory; nothing writes through it here.
  std::byte* at = const_cast<std::byte*>(in.data());
  return ForEachView(tensor, box, begin, end, [&](const at::Tensor& view) {
    view.copy_(at::from_blob(at, view.sizes(),
                             c10::TensorOptions(ToScalarType(dtype))));
    at += view.numel() * ItemSize(dtype);
  });
}

const TensorEndpoint::Memory& TensorEndpoint::MemoryOf(Entry& entry,
                                                       size_t local) {
  if (entry.memory.empty()) {
    entry.memory.reserve(entry.locals.size());
    for (const at::Tensor& tensor : entry.locals) {
      Memory& memory = entry.memory.emplace_back(
          Memory{tensor.device(),
                 !tensor.is_conj() && !tensor.is_neg(),
                 static_cast<std::byte*>(tensor.data_ptr()),
                 {}});
      for (const int64_t stride : tensor.strides()) {
        memory.strides_bytes.push_back(stride * tensor.element_size());
      }
    }
  }
  return entry.memory[local];
}

std::optional<StridedView> TensorEndpoint::ViewOn(c10::Device device,
                                                  size_t tensor,
                                                  const Box& box) {
  const absl::Span<const LocalBox> boxes = BoxesOf(tensor);
  const std::optional<size_t> index = FindBox(boxes, box);
  if (!index.has_value()) return std::nullopt;
  const Layout& layout = catalog_[tensor].layout;
  const Memory& memory = MemoryOf(entries_[tensor], LocalOf(layout, *index));
  if (memory.device != device || !memory.has_values) return std::nullopt;
  LocalView local = LocateBox(layout, memory.strides_bytes, boxes[*index], box);
  return StridedView{memory.base + local.offset, std::move(local.strides)};
}

std::optional<StridedView> TensorEndpoint::View(size_t tensor, const Box& box) {
  return ViewOn(c10::kCPU, tensor, box);
}

std::optional<StridedView> TensorEndpoint::ViewOnDevice(size_t tensor,
                                                        const Box& box,
                                                        DeviceStream& stream) {
  const c10::Device device = static_cast<TorchDeviceStream&>(stream).device();
  std::optional<StridedView> view = ViewOn(device, tensor, box);
  // Kernels cannot work at other addresses.
  const auto base = view ? reinterpret_cast<uintptr_t>(view->base) : 0;
  if (base % ItemSize(catalog_[tensor].dtype) != 0) return std::nullopt;
  return view;
}

void TensorEndpoint::Prefetch(size_t tensor) const {
  const Entry& entry = entries_[tensor];
  PrefetchBytes(&catalog_[tensor], sizeof(TensorSpec));
  if (!entry.memory.empty()) {
    PrefetchBytes(entry.memory[0].base, 1);
  } else if (!entry.locals.empty()) {
    PrefetchTensor(entry.locals[0]);
  }
}

bool TensorEndpoint::IsOnDevice(size_t tensor) const {
  return entries_[tensor].is_on_device;
}

absl::StatusOr<std::unique_ptr<DeviceStream>>
TensorEndpoint::OpenDeviceStream() {
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (IsOnDevice(i)) {
      return TorchDeviceStream::Open(entries_[i].locals[0].device());
    }
  }
  return Endpoint::OpenDeviceStream();
}

absl::Status TensorEndpoint::ReadOnDevice(size_t tensor, const Box& box,
                                          int64_t begin, int64_t end,
                                          DType dtype, DeviceStream& stream,
                                          absl::Span<std::byte> out) {
  std::byte* at = out.data();
  return ForEachView(tensor, box, begin, end, [&](const at::Tensor& view) {
    static_cast<TorchDeviceStream&>(stream).Pack(view, ToScalarType(dtype), at);
    at += view.numel() * ItemSize(dtype);
  });
}

absl::Status TensorEndpoint::WriteOnDevice(size_t tensor, const Box& box,
                                           int64_t begin, int64_t end,
                                           DType dtype, DeviceStream& stream,
                                           absl::Span<const std::byte> in) {
  const std::byte* at = in.data();
  return ForEachView(tensor, box, begin, end, [&](const at::Tensor& view) {
    static_cast<TorchDeviceStream&>(stream).Unpack(at, ToScalarType(dtype),
                                                   view);
    at += view.numel() * ItemSize(dtype);
  });
}

std::vector<size_t> TensorEndpoint::SameMemory() const {
  std::vector<size_t> first;
  absl::flat_hash_map<Digest, size_t> seen;
  for (size_t i = 0; i < entries_.size(); ++i) {
    first.push_back(i);
    DigestBuilder key;
    key.Add(static_cast<int64_t>(catalog_[i].dtype))
        .Add(catalog_[i].layout.symbols());
    int64_t num_elements = 0;
    for (const at::Tensor& local : entries_[i].locals) {
      num_elements += local.numel();
      key.Add(reinterpret_cast<intptr_t>(local.const_data_ptr()))
          .Add(absl::MakeConstSpan(local.strides().data(),
                                   local.strides().size()));
    }
    if (num_elements == 0) continue;
    first.back() = seen.try_emplace(key.Finish(), i).first->second;
  }
  return first;
}

absl::Status TensorEndpoint::Finish() {
  return TorchToStatus([&] {
    for (const Entry& entry : entries_) {
      for (const at::Tensor& local : entry.locals) {
        if (!local.is_inference()) local.unsafeGetTensorImpl()->bump_version();
      }
    }
  });
}

}  // namespace dsd
