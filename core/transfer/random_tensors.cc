// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/random_tensors.h"

#include <algorithm>
#include <cstring>
#include <utility>

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

absl::Status FillSide(const std::vector<TensorCase>& tensors, int rank,
                      bool source, Side& side) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    const LayoutSpec& spec = source ? tensors[t].from : tensors[t].to;
    const int64_t item_size = ItemSize(tensors[t].dtype);
    const std::vector<int64_t> held = HoldersOf(spec);
    std::vector<int64_t> elements;
    if (std::count(held.begin(), held.end(), rank) > 0) {
      elements = LocalElements(spec, rank);
    }
    side.buffers.emplace_back(elements.size() * item_size, std::byte{0xEE});
    if (source) {
      for (size_t i = 0; i < elements.size(); ++i) {
        FillElement(t, elements[i], item_size,
                    side.buffers.back().data() + i * item_size);
      }
    }
    DSD_ASSIGN_OR_RETURN(Layout layout, BuildLayout(spec));
    DSD_RETURN_IF_ERROR(side.endpoint.AddLocal(
        {tensors[t].fqn, tensors[t].dtype, std::move(layout)}, rank,
        side.buffers.back().data()));
  }
  return absl::OkStatus();
}

absl::Status CheckSide(const std::vector<TensorCase>& tensors, int rank,
                       const Side& side) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t item_size = ItemSize(tensors[t].dtype);
    if (side.buffers[t].empty()) continue;
    const std::vector<int64_t> elements = LocalElements(tensors[t].to, rank);
    std::vector<std::byte> expected(item_size);
    for (size_t i = 0; i < elements.size(); ++i) {
      FillElement(t, elements[i], item_size, expected.data());
      if (std::memcmp(expected.data(), &side.buffers[t][i * item_size],
                      item_size) != 0) {
        return absl::InternalError(absl::StrCat(
            "\"", tensors[t].fqn, "\" element ", elements[i], " on rank ", rank,
            " is wrong: ", tensors[t].from.ToString(), " -> ",
            tensors[t].to.ToString()));
      }
    }
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
