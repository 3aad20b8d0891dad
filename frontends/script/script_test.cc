// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/script/script.h"

#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Context.h"
#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "c10/core/InferenceMode.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/parallel/fully_shard.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/csrc/jit/api/module.h"
#include "torch/csrc/jit/serialization/import.h"
#include "torch/nn/modules/batchnorm.h"
#include "torch/nn/modules/linear.h"

namespace dsd {
namespace {

namespace jit = torch::jit;
namespace nn = torch::nn;

using ::testing::ElementsAre;
using ::testing::IsEmpty;

using Unit = std::shared_ptr<jit::CompilationUnit>;

jit::Module ScriptModule(const std::string& name, const Unit& unit) {
  return jit::Module("__torch__." + name, unit, /*shouldMangle=*/true);
}

jit::Module ScriptLinear(const Unit& unit, int64_t in, int64_t out, bool bias) {
  jit::Module module = ScriptModule("Linear", unit);
  module.register_parameter("weight", at::zeros({out, in}), false);
  if (bias) {
    module.register_parameter("bias", at::zeros({out}), false);
    module.define(R"(
      def forward(self, x):
          return torch.linear(x, self.weight, self.bias)
    )");
  } else {
    module.register_attribute("bias", c10::NoneType::get(), c10::IValue());
    module.define(R"(
      def forward(self, x):
          return torch.linear(x, self.weight)
    )");
  }
  return module;
}

jit::Module ScriptNet() {
  const Unit unit = std::make_shared<jit::CompilationUnit>();
  jit::Module net = ScriptModule("Net", unit);
  net.register_parameter("scale", at::ones({1}), false);
  net.register_buffer("count", at::zeros({}, at::kLong));
  net.register_attribute("cache", c10::TensorType::get(), at::zeros({3}));
  net.register_module("first", ScriptLinear(unit, 3, 5, true));
  net.register_module("second", ScriptLinear(unit, 5, 2, false));
  net.define(R"(
    def forward(self, x):
        return self.second.forward(torch.tanh(self.first.forward(x))) * self.scale
  )");
  return net;
}

struct NetImpl : nn::Module {
  explicit NetImpl(const std::shared_ptr<FullyShardContext>& context)
      : scale(register_parameter("scale", at::full({1}, 3.0))),
        count(register_buffer("count", at::full({}, 7, at::kLong))),
        first(register_module("first",
                              MakeFullyShard(nn::Linear(3, 5), context))),
        second(register_module(
            "second", nn::Linear(nn::LinearOptions(5, 2).bias(false)))) {}

  at::Tensor forward(at::Tensor x) {
    return second->forward(first->forward(std::move(x)).tanh()) * scale;
  }

  at::Tensor scale;
  at::Tensor count;
  std::shared_ptr<FullyShard<nn::LinearImpl>> first;
  nn::Linear second;
};

std::vector<std::string> KeysOf(const StateDict& dict) {
  std::vector<std::string> keys;
  for (size_t i = 0; i < dict.size(); ++i) keys.push_back(dict.key_text(i));
  return keys;
}

at::Tensor Input() { return at::arange(12).to(at::kFloat).view({4, 3}).sin(); }

TEST(ScriptTest, ParametersAndBuffersInOrderWithoutOtherAttributes) {
  const jit::Module net = ScriptNet();
  const absl::StatusOr<StateDict> state = GetModelStateDict(net);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_THAT(KeysOf(*state), ElementsAre("scale", "count", "first.weight",
                                          "first.bias", "second.weight"));
}

TEST(ScriptTest, SharedSubmodulesAreTied) {
  const Unit unit = std::make_shared<jit::CompilationUnit>();
  jit::Module net = ScriptModule("Twice", unit);
  const jit::Module part = ScriptLinear(unit, 2, 2, false);
  net.register_module("a", part);
  net.register_module("b", part);
  absl::StatusOr<StateDict> state = GetModelStateDict(net);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_THAT(KeysOf(*state), ElementsAre("a.weight", "b.weight"));
  StateDict only_b;
  only_b.Set("b.weight", Value(at::full({2, 2}, 4.0)));
  const auto keys = SetModelStateDict(net, only_b);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(part.attr("weight").toTensor().eq(4.0).all().item<bool>());
}

TEST(ScriptTest, ReportsAllKeysThatDoNotFitAndChangesNothing) {
  jit::Module net = ScriptNet();
  StateDict state;
  state.Set("first.weight", Value(at::ones({5, 4})));
  state.Set("stranger", Value(at::ones({1})));
  const auto keys = SetModelStateDict(net, state);
  ASSERT_EQ(keys.status().code(), absl::StatusCode::kInvalidArgument);
  for (const char* name : {"first.weight", "stranger", "scale", "count",
                           "first.bias", "second.weight"}) {
    EXPECT_THAT(std::string(keys.status().message()),
                ::testing::HasSubstr(name));
  }
  EXPECT_TRUE(net.attr("scale").toTensor().eq(1.0).all().item<bool>());
}

TEST(ScriptTest, FilledFromTheShardsOfATrainer) {
  absl::Mutex seed_mu;
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              return TorchToStatus([&]() -> absl::Status {
                const auto context = std::make_shared<FullyShardContext>(&comm);
                std::shared_ptr<FullyShard<NetImpl>> trainer;
                {
                  absl::MutexLock lock(&seed_mu);
                  at::manual_seed(5);
                  trainer = MakeFullyShard(std::make_shared<NetImpl>(context),
                                           context);
                }
                jit::Module served = ScriptNet();
                // The graph has been specialized before the values come.
                for (int i = 0; i < 3; ++i) served.forward({Input()});

                DSD_ASSIGN_OR_RETURN(const StateDict shards,
                                     GetModelStateDict(*trainer, &comm));
                DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                                     SetModelStateDict(served, shards, &comm));
                if (!keys.empty()) return absl::InternalError("keys differ");

                const at::NoGradGuard no_grad;
                const at::Tensor expected = trainer->forward(Input());
                if (!at::equal(served.forward({Input()}).toTensor(),
                               expected)) {
                  return absl::InternalError("served model differs");
                }
                if (served.attr("count").toTensor().item<int64_t>() != 7) {
                  return absl::InternalError("buffer differs");
                }
                std::stringstream file;
                served.save(file);
                if (!at::equal(jit::load(file).forward({Input()}).toTensor(),
                               expected)) {
                  return absl::InternalError("saved model differs");
                }
                return absl::OkStatus();
              });
            }),
        AllOk())
        << ranks << " ranks";
  }
}

// Servers load under InferenceMode, whose tensors refuse changes elsewhere.
TEST(ScriptTest, TensorsOfInferenceModeAreFilledToo) {
  StateDict state;
  {
    jit::Module trained = ScriptNet();
    trained.attr("scale").toTensor().fill_(2.0);
    absl::StatusOr<StateDict> got = GetModelStateDict(trained);
    ASSERT_TRUE(got.ok()) << got.status();
    state = *std::move(got);
  }
  jit::Module served = [] {
    const c10::InferenceMode inference;
    return ScriptNet();
  }();
  const auto keys = SetModelStateDict(served, state);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_EQ(served.attr("scale").toTensor().item<float>(), 2.0F);
}

TEST(ScriptTest, AModuleWithoutTensorsIsEmpty) {
  const absl::StatusOr<StateDict> state =
      GetModelStateDict(jit::Module("Empty"));
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_THAT(KeysOf(*state), IsEmpty());
}

}  // namespace
}  // namespace dsd
