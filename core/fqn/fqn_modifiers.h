// SPDX-License-Identifier: Apache-2.0
//
// What a module says about a child that its names do not show: Python's
// _fqn_modifiers().

#ifndef DSD_CORE_FQN_FQN_MODIFIERS_H_
#define DSD_CORE_FQN_FQN_MODIFIERS_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace dsd {

// `name` (a tensor or module of the child) is shown as if the parent had it.
struct FqnModifier {
  std::string name;
  std::string hidden_child;
};

// Inherited by a module class beside its module base:
//
//   struct TokensImpl : torch::nn::Module, dsd::FqnModifiers {
//     TokensImpl()
//         : embedding(register_module("embedding", torch::nn::Embedding(9, 4)))
//     {}
//     // "tokens.weight" instead of "tokens.embedding.weight"
//     std::vector<dsd::FqnModifier> fqn_modifiers(
//         absl::string_view) const override {
//       return {{"weight", "embedding"}};
//     }
//     torch::nn::Embedding embedding;
//   };
//
// Everything in a hidden child loses that child's segment, in get and set, of
// models and of optimizers alike.
class FqnModifiers {
 public:
  // `which` is StateDictOptions::dsd_fqn_modifiers, for classes that have
  // several sets of names; most ignore it. Every hidden child must exist and
  // have the name.
  virtual std::vector<FqnModifier> fqn_modifiers(
      absl::string_view which) const = 0;

 protected:
  ~FqnModifiers() = default;
};

}  // namespace dsd

#endif  // DSD_CORE_FQN_FQN_MODIFIERS_H_
