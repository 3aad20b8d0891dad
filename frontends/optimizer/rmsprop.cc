// SPDX-License-Identifier: Apache-2.0

#include "torch/optim/rmsprop.h"

#include <memory>

#include "dsd/frontends/optimizer/builtin_codecs.h"
#include "dsd/frontends/optimizer/typed_codec.h"

namespace dsd {

std::unique_ptr<const OptimizerCodec> MakeRmspropCodec() {
  using Options = torch::optim::RMSpropOptions;
  using State = torch::optim::RMSpropParamState;
  CodecTables<Options, State> tables;
  tables.name = "RMSprop";
  tables.native = {
      {"lr", +[](Options& o) -> double& { return o.lr(); }},
      {"momentum", +[](Options& o) -> double& { return o.momentum(); }},
      {"alpha", +[](Options& o) -> double& { return o.alpha(); }},
      {"eps", +[](Options& o) -> double& { return o.eps(); }},
      {"centered", +[](Options& o) -> bool& { return o.centered(); }},
      {"weight_decay", +[](Options& o) -> double& { return o.weight_decay(); }},
  };
  tables.python = {
      {"capturable", false},
      {"foreach", None()},
      {"maximize", false, /*changes_training=*/true},
      {"differentiable", false},
  };
  tables.step = +[](State& s) -> int64_t& { return s.step(); };
  tables.tensors = {
      {"square_avg", +[](State& s) -> at::Tensor& { return s.square_avg(); },
       +[](const Options&) { return true; }},
      {"momentum_buffer",
       +[](State& s) -> at::Tensor& { return s.momentum_buffer(); },
       +[](const Options& o) { return o.momentum() > 0; }},
      {"grad_avg", +[](State& s) -> at::Tensor& { return s.grad_avg(); },
       +[](const Options& o) { return o.centered(); }},
  };
  return std::make_unique<TypedCodec<torch::optim::RMSprop, Options, State>>(
      std::move(tables));
}

}  // namespace dsd
