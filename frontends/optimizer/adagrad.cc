// SPDX-License-Identifier: Apache-2.0

#include "torch/optim/adagrad.h"

#include <memory>

#include "dsd/frontends/optimizer/builtin_codecs.h"
#include "dsd/frontends/optimizer/typed_codec.h"

namespace dsd {

std::unique_ptr<const OptimizerCodec> MakeAdagradCodec() {
  using Options = torch::optim::AdagradOptions;
  using State = torch::optim::AdagradParamState;
  CodecTables<Options, State> tables;
  tables.name = "Adagrad";
  tables.native = {
      {"lr", +[](Options& o) -> double& { return o.lr(); }},
      {"lr_decay", +[](Options& o) -> double& { return o.lr_decay(); }},
      {"eps", +[](Options& o) -> double& { return o.eps(); }},
      {"weight_decay", +[](Options& o) -> double& { return o.weight_decay(); }},
      {"initial_accumulator_value",
       +[](Options& o) -> double& { return o.initial_accumulator_value(); }},
  };
  tables.python = {
      {"foreach", None()},
      {"maximize", false, /*changes_training=*/true},
      {"differentiable", false},
      {"fused", None()},
  };
  tables.step = +[](State& s) -> int64_t& { return s.step(); };
  tables.tensors = {
      {"sum", +[](State& s) -> at::Tensor& { return s.sum(); },
       +[](const Options&) { return true; },
       +[](const Options& o) { return o.initial_accumulator_value(); }},
  };
  return std::make_unique<TypedCodec<torch::optim::Adagrad, Options, State>>(
      std::move(tables));
}

}  // namespace dsd
