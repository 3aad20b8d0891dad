// SPDX-License-Identifier: Apache-2.0

#include "torch/optim/sgd.h"

#include <memory>

#include "dsd/frontends/optimizer/builtin_codecs.h"
#include "dsd/frontends/optimizer/typed_codec.h"

namespace dsd {

std::unique_ptr<const OptimizerCodec> MakeSgdCodec() {
  using Options = torch::optim::SGDOptions;
  using State = torch::optim::SGDParamState;
  CodecTables<Options, State> tables;
  tables.name = "SGD";
  tables.native = {
      {"lr", +[](Options& o) -> double& { return o.lr(); }},
      {"momentum", +[](Options& o) -> double& { return o.momentum(); }},
      {"dampening", +[](Options& o) -> double& { return o.dampening(); }},
      {"weight_decay", +[](Options& o) -> double& { return o.weight_decay(); }},
      {"nesterov", +[](Options& o) -> bool& { return o.nesterov(); }},
  };
  tables.python = {
      {"maximize", false, /*changes_training=*/true},
      {"foreach", None()},
      {"differentiable", false},
      {"fused", None()},
  };
  // The first step makes the buffer from the gradient; zeros in its place would
  // be another state if there is dampening. So before it there is none.
  tables.tensors = {
      {"momentum_buffer",
       +[](State& s) -> at::Tensor& { return s.momentum_buffer(); },
       +[](const Options&) { return false; }},
  };
  return std::make_unique<TypedCodec<torch::optim::SGD, Options, State>>(
      std::move(tables));
}

}  // namespace dsd
