// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/catalogue/fixtures.h"

#include "ATen/CPUGeneratorImpl.h"
#include "ATen/Context.h"
#include "ATen/Functions.h"
#include "ATen/Parallel.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/activation.h"
#include "torch/nn/modules/container/sequential.h"
#include "torch/nn/modules/embedding.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adam.h"
#include "torch/optim/adamw.h"
#include "torch/optim/sgd.h"

namespace dsd::catalogue {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;

using Context = std::shared_ptr<FullyShardContext>;

// `inner` as `build` wants it, `shard` saying whether it is a unit of its own.
template <class M>
Model Place(const std::shared_ptr<M>& inner, bool shard, const Context& context,
            const std::vector<absl::string_view>& wrappers) {
  Model placed{inner, [inner](at::Tensor x) { return inner->forward(x); }};
  if (shard) {
    auto unit = MakeFullyShard(inner, context);
    placed = {unit, [unit](at::Tensor x) { return unit->forward(x); }};
  }
  for (const absl::string_view segment : wrappers) {
    placed.module = std::make_shared<Wrapper>(placed.module, segment);
  }
  return placed;
}

struct UnitModule : nn::Module {
  UnitModule()
      : l1(register_module("l1", nn::Linear(kWidth, kWidth))),
        seq(register_module(
            "seq", nn::Sequential(nn::ReLU(), nn::Linear(kWidth, kWidth),
                                  nn::ReLU()))),
        l2(register_module("l2", nn::Linear(kWidth, kWidth))) {}

  at::Tensor forward(at::Tensor x) {
    return l2->forward(seq->forward(l1->forward(std::move(x))));
  }

  nn::Linear l1;
  nn::Sequential seq;
  nn::Linear l2;
};

struct CompositeParamModel : nn::Module {
  CompositeParamModel(const Build& build, const Context& context)
      : l(register_module("l", nn::Linear(kWidth, kWidth))),
        p(register_parameter("p", at::randn({kWidth, kWidth}))) {
    for (const char* name : {"u1", "u2"}) {
      const auto unit = std::make_shared<UnitModule>();
      if (build.freeze_units) {
        for (at::Tensor& parameter : unit->parameters()) {
          parameter.requires_grad_(false);
        }
      }
      std::vector<absl::string_view> wrappers;
      if (!build.unit_wrapper.empty()) wrappers = {build.unit_wrapper};
      units.push_back(Place(unit, build.shard_units, context, wrappers));
      register_module(name, units.back().module);
    }
  }

  at::Tensor forward(at::Tensor x) {
    x = l->forward(std::move(x));
    for (const Model& unit : units) x = unit.forward(x);
    return at::mm(x, p);
  }

  nn::Linear l;
  at::Tensor p;
  std::vector<Model> units;
};

// A Linear whose weight is somebody else's.
struct TiedLinear : nn::Module {
  TiedLinear(const at::Tensor& tied, int64_t out)
      : weight(register_parameter("weight", tied)),
        bias(register_parameter("bias", at::zeros({out}))) {}
  at::Tensor weight;
  at::Tensor bias;
};

struct TiedEmbeddingModel : nn::Module {
  explicit TiedEmbeddingModel(int64_t vocabulary)
      : embedding(
            register_module("embedding", nn::Embedding(vocabulary, kWidth))),
        decoder(register_module(
            "decoder",
            std::make_shared<TiedLinear>(embedding->weight, vocabulary))) {}

  at::Tensor forward(at::Tensor ids) {
    const at::Tensor x =
        at::embedding(embedding->weight, ids.to(at::kLong)).mean(1);
    return at::linear(x, decoder->weight, decoder->bias);
  }

  nn::Embedding embedding;
  std::shared_ptr<TiedLinear> decoder;
};

absl::Mutex& SeedMutex() {
  static absl::Mutex mu;
  return mu;
}

Context MakeContext(Communicator* comm, const Build& build) {
  if (!build.shard_root && !build.shard_units) return nullptr;
  return std::make_shared<FullyShardContext>(comm);
}

}  // namespace

Model MakeComposite(Communicator* comm, const Build& build) {
  // Ranks are threads of one process, with one generator between them.
  absl::MutexLock lock(&SeedMutex());
  at::manual_seed(build.seed);
  const Context context = MakeContext(comm, build);
  return Place(std::make_shared<CompositeParamModel>(build, context),
               build.shard_root, context, build.wrappers);
}

Model MakeTied(Communicator* comm, const Build& build, int64_t vocabulary) {
  absl::MutexLock lock(&SeedMutex());
  at::manual_seed(build.seed);
  const Context context = MakeContext(comm, build);
  return Place(std::make_shared<TiedEmbeddingModel>(vocabulary),
               build.shard_root, context, build.wrappers);
}

std::unique_ptr<optim::Optimizer> MakeOptimizer(OptimizerKind kind,
                                                std::vector<at::Tensor> params,
                                                double lr) {
  switch (kind) {
    case OptimizerKind::kSgd:
      return std::make_unique<optim::SGD>(std::move(params),
                                          optim::SGDOptions(lr).momentum(0.9));
    case OptimizerKind::kAdam:
      return std::make_unique<optim::Adam>(std::move(params),
                                           optim::AdamOptions(lr));
    case OptimizerKind::kAdamW:
      break;
  }
  return std::make_unique<optim::AdamW>(std::move(params),
                                        optim::AdamWOptions(lr));
}

void Train(const Model& model, const std::vector<optim::Optimizer*>& optimizers,
           int begin, int end, at::ScalarType input) {
  for (int step = begin; step < end; ++step) {
    for (optim::Optimizer* optimizer : optimizers) optimizer->zero_grad();
    auto generator = at::detail::createCPUGenerator(100 + step);
    const at::Tensor x =
        input == at::kFloat
            ? at::randn({8, kWidth}, generator, at::TensorOptions())
            : at::randint(0, 5, {8, 3}, generator, at::TensorOptions(input));
    model.forward(x).pow(2).mean().backward();
    for (optim::Optimizer* optimizer : optimizers) optimizer->step();
  }
  for (optim::Optimizer* optimizer : optimizers) optimizer->zero_grad();
}

absl::Status ExpectEqual(const StateDict& found, const StateDict& expected,
                         absl::string_view what) {
  DiffOptions options;
  options.compare_key_order = true;
  options.max_differences = 3;
  DSD_ASSIGN_OR_RETURN(const std::vector<std::string> differences,
                       DiffStateDicts(found, expected, options));
  if (differences.empty()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      what, " (found and expected): ", absl::StrJoin(differences, "; ")));
}

absl::Status Expect(bool ok, absl::string_view what) {
  if (ok) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("expected that ", what));
}

void OnRanks(absl::FunctionRef<absl::Status(Communicator&)> body,
             const std::vector<int>& world_sizes) {
  // Of each rank's thread.
  at::set_num_threads(1);
  for (const int ranks : world_sizes) {
    EXPECT_THAT(
        RunRankThreads(ranks,
                       [&](Communicator& comm) {
                         return TorchToStatus([&] { return body(comm); });
                       }),
        AllOk())
        << ranks << " ranks";
  }
}

std::vector<std::string> KeysOf(const StateDict& dict) {
  std::vector<std::string> keys;
  for (size_t i = 0; i < dict.size(); ++i) keys.push_back(dict.key_text(i));
  return keys;
}

at::Tensor TensorAt(const StateDict& dict, absl::string_view key) {
  return *dict.Find(key)->get_if<TensorValue>()->Local();
}

}  // namespace dsd::catalogue
