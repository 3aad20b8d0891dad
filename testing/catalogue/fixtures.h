// SPDX-License-Identifier: Apache-2.0
//
// The models of PyTorch's tests of distributed state dicts, and how they are
// built, trained and compared here.

#ifndef DSD_TESTING_CATALOGUE_FIXTURES_H_
#define DSD_TESTING_CATALOGUE_FIXTURES_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "dsd/core/state_dict/state_dict.h"
#include "dsd/frontends/parallel/fully_shard.h"
#include "torch/nn/module.h"
#include "torch/optim/optimizer.h"

namespace dsd::catalogue {

// Extent of all layers: odd, so that shards are uneven on 2 and 4 ranks.
inline constexpr int64_t kWidth = 11;

// One of PyTorch's wrappers: a segment in raw names, none in FQNs.
class Wrapper : public torch::nn::Module, public ModuleWrapper {
 public:
  Wrapper(std::shared_ptr<torch::nn::Module> inner, absl::string_view segment)
      : segment_(segment) {
    register_module(segment_, std::move(inner));
  }
  absl::string_view wrapped_child_name() const override { return segment_; }

 private:
  const std::string segment_;
};

struct Build {
  int seed = 0;
  bool shard_root = false;
  bool shard_units = false;
  // Segments of wrappers around the root, from the inside.
  std::vector<absl::string_view> wrappers;
  // Around each unit; empty: none.
  absl::string_view unit_wrapper;
  bool freeze_units = false;
};

using Forward = std::function<at::Tensor(at::Tensor)>;

struct Model {
  std::shared_ptr<torch::nn::Module> module;
  Forward forward;
};

// PyTorch's CompositeParamModel: 15 keys. Equal on all ranks for equal seeds.
// `comm` has the ranks over which it is sharded; null: a world of one.
Model MakeComposite(Communicator* comm, const Build& build);

// PyTorch's TiedEmbeddingModel(vocabulary, kWidth): "embedding.weight" and
// "decoder.weight" are one tensor.
Model MakeTied(Communicator* comm, const Build& build, int64_t vocabulary);

enum class OptimizerKind { kSgd, kAdam, kAdamW };
inline constexpr OptimizerKind kAllOptimizers[] = {
    OptimizerKind::kSgd, OptimizerKind::kAdam, OptimizerKind::kAdamW};

std::unique_ptr<torch::optim::Optimizer> MakeOptimizer(
    OptimizerKind kind, std::vector<at::Tensor> params, double lr = 1e-2);

// Steps [begin, end) on batches that are the same on all ranks, so that the
// mean over 1, 2 or 4 of them is exact.
void Train(const Model& model,
           const std::vector<torch::optim::Optimizer*>& optimizers, int begin,
           int end, at::ScalarType input = at::kFloat);

// OK if the dicts have equal keys in equal order and equal values, bit for bit.
absl::Status ExpectEqual(const StateDict& found, const StateDict& expected,
                         absl::string_view what);

// OK if `ok`.
absl::Status Expect(bool ok, absl::string_view what);

// Runs `body` on 1, 2 and 4 ranks, which are threads, and expects OK from all.
void OnRanks(absl::FunctionRef<absl::Status(Communicator&)> body,
             const std::vector<int>& world_sizes = {1, 2, 4});

std::vector<std::string> KeysOf(const StateDict& dict);

// The local tensor of a top-level key. Precondition: there is one.
at::Tensor TensorAt(const StateDict& dict, absl::string_view key);

}  // namespace dsd::catalogue

#endif  // DSD_TESTING_CATALOGUE_FIXTURES_H_
