// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/tied_values.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/equal.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/fqn/fqn_table.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

// Whether tensors of one shape have other values, as far as that can be told.
bool Differ(const at::Tensor& a, const at::Tensor& b, c10::ScalarType type) {
  if (IdentityOf(a) == IdentityOf(b)) return false;
  const auto bytes_of = [&](const at::Tensor& tensor) {
    at::Tensor flat = tensor.detach().resolve_conj().resolve_neg().to(type);
    if (a.device() != b.device()) flat = flat.cpu();
    return flat.reshape({-1}).contiguous().view(c10::ScalarType::Byte);
  };
  const absl::StatusOr<bool> same =
      TorchToStatus([&] { return at::equal(bytes_of(a), bytes_of(b)); });
  return same.ok() && !*same;
}

// The dimensions of `value` as they lie in the memory of `live`.
at::Tensor InMemoryOrder(const at::Tensor& value, const at::Tensor& live) {
  if (value.dim() != live.dim()) return value;
  std::vector<int64_t> order;
  for (int64_t d = 0; d < live.dim(); ++d) {
    if (live.size(d) != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return live.stride(a) < live.stride(b);
  });
  for (int64_t d = 0; d < live.dim(); ++d) {
    if (live.size(d) == 1) order.push_back(d);
  }
  return value.permute(order);
}

}  // namespace

std::vector<TiedDifference> FindTiedDifferences(LiveModel& live,
                                                const KeyScope& scope,
                                                const StateDict& dict) {
  struct First {
    size_t group;
    std::string key;
    const TensorValue* value;
  };
  absl::flat_hash_map<size_t, First> first_of;  // by leader
  std::vector<TiedDifference> found;
  const FqnTable& table = live.table();
  const bool has_overlap = live.has_overlap();
  for (size_t group = 0; group < table.groups().size(); ++group) {
    if (table.groups()[group].size() == 1 && !has_overlap) continue;
    if (live.extra_state(group) != nullptr) continue;
    for (const size_t index : table.groups()[group]) {
      scope.ForEachKey(table.entries()[index], [&](const std::string& key) {
        const Value* const in_dict = dict.Find(key);
        const auto* const value =
            in_dict == nullptr ? nullptr : in_dict->get_if<TensorValue>();
        if (value == nullptr) return;
        const auto [it, is_new] = first_of.try_emplace(
            live.LeaderOf(group), First{group, key, value});
        const First& first = it->second;
        if (is_new || first.value->id() == value->id()) return;
        // Of other memory order, and maybe read as something else.
        const bool is_other = first.group != group;
        const at::Tensor& first_live = live.tensor(first.group);
        const at::Tensor& this_live = live.tensor(group);
        const bool is_comparable =
            first_live.scalar_type() == this_live.scalar_type() &&
            first_live.is_conj() == this_live.is_conj() &&
            first_live.is_neg() == this_live.is_neg() &&
            value->is_plain() == first.value->is_plain() &&
            value->locals().size() == first.value->locals().size() &&
            (value->is_plain() ||
             (!is_other &&
              Layout::SameGeometry(value->layout(), first.value->layout())));
        for (size_t i = 0; is_comparable && i < value->locals().size(); ++i) {
          at::Tensor a = first.value->locals()[i];
          at::Tensor b = value->locals()[i];
          if (is_other) {
            a = InMemoryOrder(a, first_live);
            b = InMemoryOrder(b, this_live);
          }
          if (!Differ(a, b, this_live.scalar_type())) continue;
          found.push_back({key, first.key});
          return;
        }
      });
    }
  }
  return found;
}

}  // namespace dsd
