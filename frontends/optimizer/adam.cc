// SPDX-License-Identifier: Apache-2.0

#include "torch/optim/adam.h"

#include <memory>

#include "dsd/frontends/optimizer/adam_tables.h"
#include "dsd/frontends/optimizer/builtin_codecs.h"

namespace dsd {

std::unique_ptr<const OptimizerCodec> MakeAdamCodec() {
  using torch::optim::Adam;
  using torch::optim::AdamOptions;
  using torch::optim::AdamParamState;
  return std::make_unique<TypedCodec<Adam, AdamOptions, AdamParamState>>(
      AdamTables<AdamOptions, AdamParamState>(
          "Adam", /*decoupled_weight_decay=*/false));
}

}  // namespace dsd
