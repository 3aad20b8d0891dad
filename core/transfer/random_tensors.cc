// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/random_tensors.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/log/check.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"

namespace dsd::test {

void FillElement(size_t tensor, int64_t index, int64_t item_size,
                 std::byte* out) {
  for (int64_t b = 0; b < item_size; ++b) {
    out[b] = static_cast<std::byte>(1 + 31 * tensor + 7 * index + 13 * b +
                                    (index >> 5));
  }
}

TensorCase RowsToColumns(int size) {
  TensorCase tensor;
  tensor.fqn = "encoder.weight";
  tensor.dtype = DType::kFloat32;
  tensor.from.kind = LayoutSpec::Kind::kPlacements;
  tensor.from.shape = {64, 64};
  tensor.from.mesh_shape = {size};
  for (int rank = 0; rank < size; ++rank) {
    tensor.from.mesh_holders.push_back(rank);
  }
  tensor.from.placements = {{'S', 0, 1}};
  tensor.to = tensor.from;
  tensor.to.placements = {{'S', 1, 1}};
  return tensor;
}

TensorCase OneToAll(int size, int64_t elements) {
  TensorCase tensor;
  tensor.fqn = "embedding.weight";
  tensor.dtype = DType::kFloat32;
  tensor.from.shape = {elements};
  tensor.from.holders = {0};
  tensor.to = tensor.from;
  for (int rank = 1; rank < size; ++rank) tensor.to.holders.push_back(rank);
  return tensor;
}

std::vector<std::byte> LocalBytes(const std::vector<TensorCase>& tensors,
                                  size_t tensor, int rank, bool source) {
  const TensorCase& one = tensors[tensor];
  const LayoutSpec& spec = source ? one.from : one.to;
  const std::vector<int64_t> held = HoldersOf(spec);
  if (std::count(held.begin(), held.end(), rank) == 0) return {};
  const int64_t item_size = ItemSize(one.dtype);
  const std::vector<int64_t> elements = LocalElements(spec, rank);
  std::vector<std::byte> bytes(elements.size() * item_size, std::byte{0xEE});
  for (size_t i = 0; source && i < elements.size(); ++i) {
    FillElement(tensor, elements[i], item_size, &bytes[i * item_size]);
  }
  return bytes;
}

absl::Status CheckBytes(const std::vector<TensorCase>& tensors, size_t tensor,
                        int rank, absl::Span<const std::byte> bytes) {
  if (bytes.empty()) return absl::OkStatus();
  const TensorCase& one = tensors[tensor];
  const int64_t item_size = ItemSize(one.dtype);
  const std::vector<int64_t> elements = LocalElements(one.to, rank);
  std::vector<std::byte> expected(item_size);
  for (size_t i = 0; i < elements.size(); ++i) {
    FillElement(tensor, elements[i], item_size, expected.data());
    if (std::memcmp(expected.data(), &bytes[i * item_size], item_size) == 0) {
      continue;
    }
    return absl::InternalError(absl::StrCat(
        "\"", one.fqn, "\" element ", elements[i], " on rank ", rank,
        " is wrong: ", one.from.ToString(), " -> ", one.to.ToString()));
  }
  return absl::OkStatus();
}

StorageEndpoint::StorageEndpoint(const std::vector<TensorCase>& tensors,
                                 std::atomic<int64_t>* bytes_read)
    : bytes_read_(bytes_read) {
  for (const TensorCase& tensor : tensors) {
    const Dims shape(tensor.to.shape.begin(), tensor.to.shape.end());
    CHECK_OK(catalog_.Add({tensor.fqn, tensor.dtype, Layout::Anywhere(shape)}));
  }
}

absl::Status StorageEndpoint::Read(size_t tensor, const Box& box, int64_t begin,
                                   int64_t end, DType dtype,
                                   absl::Span<std::byte> out) {
  const int64_t item_size = ItemSize(dtype);
  const Dims extents = box.extents();
  for (int64_t i = begin; i < end; ++i) {
    Dims at(box.ndim());
    int64_t rest = i;
    for (int d = box.ndim() - 1; d >= 0; --d) {
      at[d] = box.lo[d] + rest % extents[d];
      rest /= extents[d];
    }
    FillElement(tensor, FlatIndex(catalog_[tensor].shape(), at), item_size,
                out.data() + (i - begin) * item_size);
  }
  if (bytes_read_ != nullptr) *bytes_read_ += (end - begin) * item_size;
  return absl::OkStatus();
}

absl::Status StorageEndpoint::Write(size_t, const Box&, int64_t, int64_t, DType,
                                    absl::Span<const std::byte>) {
  return absl::UnimplementedError("storage is read only");
}

absl::Status FillSide(const std::vector<TensorCase>& tensors, int rank,
                      bool source, Side& side) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    side.buffers.push_back(LocalBytes(tensors, t, rank, source));
    DSD_ASSIGN_OR_RETURN(Layout layout,
                         BuildLayout(source ? tensors[t].from : tensors[t].to));
    DSD_RETURN_IF_ERROR(side.endpoint.AddLocal(
        {tensors[t].fqn, tensors[t].dtype, std::move(layout)}, rank,
        side.buffers.back().data()));
  }
  return absl::OkStatus();
}

absl::Status CheckSide(const std::vector<TensorCase>& tensors, int rank,
                       const Side& side) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    DSD_RETURN_IF_ERROR(CheckBytes(tensors, t, rank, side.buffers[t]));
  }
  return absl::OkStatus();
}

std::vector<TensorCase> RandomTensors(Random& random, int size) {
  const DType types[] = {DType::kUInt8, DType::kFloat16, DType::kFloat32,
                         DType::kInt64, DType::kComplex128};
  std::vector<TensorCase> tensors(Uniform(random, 1, 4));
  RandomLayoutOptions options;
  for (int rank = 0; rank < size; ++rank) options.holders.push_back(rank);
  for (size_t t = 0; t < tensors.size(); ++t) {
    tensors[t].fqn = absl::StrCat("layer.", t, ".weight");
    tensors[t].dtype = types[Uniform(random, 0, 4)];
    const auto shape = RandomShape(random, 300);
    tensors[t].from = RandomLayoutSpec(random, shape, options);
    tensors[t].to = RandomLayoutSpec(random, shape, options);
  }
  return tensors;
}

int64_t MissingBytes(const std::vector<TensorCase>& tensors, int64_t rank) {
  int64_t bytes = 0;
  for (const TensorCase& tensor : tensors) {
    const auto have = HoldersByElement(tensor.from);
    const auto need = HoldersByElement(tensor.to);
    for (size_t i = 0; i < need.size(); ++i) {
      if (std::count(need[i].begin(), need[i].end(), rank) > 0 &&
          std::count(have[i].begin(), have[i].end(), rank) == 0) {
        bytes += ItemSize(tensor.dtype);
      }
    }
  }
  return bytes;
}

}  // namespace dsd::test
