// SPDX-License-Identifier: Apache-2.0

#include "torch/optim/adamw.h"

#include <memory>

#include "dsd/frontends/optimizer/adam_tables.h"
#include "dsd/frontends/optimizer/builtin_codecs.h"

namespace dsd {

std::unique_ptr<const OptimizerCodec> MakeAdamWCodec() {
  using torch::optim::AdamW;
  using torch::optim::AdamWOptions;
  using torch::optim::AdamWParamState;
  return std::make_unique<TypedCodec<AdamW, AdamWOptions, AdamWParamState>>(
      AdamTables<AdamWOptions, AdamWParamState>(
          "AdamW", /*decoupled_weight_decay=*/true));
}

}  // namespace dsd
