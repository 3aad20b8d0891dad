// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/parallel/fully_shard.h"

#include <string>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

// Adds the parameters at and below `module`, down to inner units. A module that
// is reachable by two paths counts once.
void AddParameters(const torch::nn::Module& module, const std::string& prefix,
                   absl::flat_hash_set<const torch::nn::Module*>& seen,
                   internal::ShardUnit& unit) {
  if (!seen.insert(&module).second) return;
  for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
    unit.Add(absl::StrCat(prefix, parameter.key()), parameter.value());
  }
  for (const auto& child : module.named_children()) {
    if (dynamic_cast<const FullyShardBase*>(child.value().get()) != nullptr) {
      continue;
    }
    AddParameters(*child.value(), absl::StrCat(prefix, child.key(), "."), seen,
                  unit);
  }
}

std::shared_ptr<internal::ShardUnit> MakeUnit(
    const torch::nn::Module* inner,
    std::shared_ptr<FullyShardContext> context) {
  if (inner == nullptr || context == nullptr) {
    throw StatusError(absl::InvalidArgumentError(absl::StrCat(
        "FullyShard: the ", inner == nullptr ? "module" : "FullyShardContext",
        " is null, expected one")));
  }
  return std::make_shared<internal::ShardUnit>(std::move(context),
                                               inner->name());
}

}  // namespace

FullyShardBase::FullyShardBase(std::shared_ptr<torch::nn::Module> inner,
                               std::shared_ptr<FullyShardContext> context)
    : unit_(MakeUnit(inner.get(), std::move(context))) {
  absl::flat_hash_set<const torch::nn::Module*> seen;
  AddParameters(*inner, /*prefix=*/"", seen, *unit_);
  unit_->Shard();
  register_module(std::string(kFsdpSegment), std::move(inner));
}

}  // namespace dsd
