// SPDX-License-Identifier: Apache-2.0
//
// What Adam and AdamW have in common: everything but the classes and one
// default.

#ifndef DSD_FRONTENDS_OPTIMIZER_ADAM_TABLES_H_
#define DSD_FRONTENDS_OPTIMIZER_ADAM_TABLES_H_

#include <string>
#include <utility>

#include "dsd/frontends/optimizer/typed_codec.h"

namespace dsd {

template <class Options, class State>
CodecTables<Options, State> AdamTables(std::string name,
                                       bool decoupled_weight_decay) {
  using Pair = typename NativeField<Options>::Pair;
  CodecTables<Options, State> tables;
  tables.name = std::move(name);
  tables.native = {
      {"lr", +[](Options& o) -> double& { return o.lr(); }},
      {"betas", +[](Options& o) -> Pair& { return o.betas(); }},
      {"eps", +[](Options& o) -> double& { return o.eps(); }},
      {"weight_decay", +[](Options& o) -> double& { return o.weight_decay(); }},
      {"amsgrad", +[](Options& o) -> bool& { return o.amsgrad(); }},
  };
  tables.python = {
      {"maximize", false, /*changes_training=*/true},
      {"foreach", None()},
      {"capturable", false},
      {"differentiable", false},
      {"fused", None()},
      {"decoupled_weight_decay", decoupled_weight_decay,
       /*changes_training=*/true},
  };
  tables.step = +[](State& s) -> int64_t& { return s.step(); };
  tables.tensors = {
      {"exp_avg", +[](State& s) -> at::Tensor& { return s.exp_avg(); },
       +[](const Options&) { return true; }},
      {"exp_avg_sq", +[](State& s) -> at::Tensor& { return s.exp_avg_sq(); },
       +[](const Options&) { return true; }},
      {"max_exp_avg_sq",
       +[](State& s) -> at::Tensor& { return s.max_exp_avg_sq(); },
       +[](const Options& o) { return o.amsgrad(); }},
  };
  return tables;
}

}  // namespace dsd

#endif  // DSD_FRONTENDS_OPTIMIZER_ADAM_TABLES_H_
