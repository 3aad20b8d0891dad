// SPDX-License-Identifier: Apache-2.0
//
// FullyShard against a dense model whose per-rank gradients are summed in rank
// order and scaled by 1 / world size: equal bit for bit, whatever the network,
// optimizer and number of ranks. Ranks are threads.

#include "dsd/frontends/parallel/fully_shard.h"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ATen/CPUGeneratorImpl.h"
#include "ATen/Functions.h"
#include "ATen/Parallel.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/csrc/autograd/autograd.h"
#include "torch/nn/functional/activation.h"
#include "torch/nn/modules/container/sequential.h"
#include "torch/nn/modules/linear.h"
#include "torch/nn/modules/normalization.h"
#include "torch/nn/modules/rnn.h"
#include "torch/optim/adam.h"
#include "torch/optim/adamw.h"
#include "torch/optim/sgd.h"

namespace dsd {
namespace {

namespace nn = torch::nn;
using ::at::Tensor;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kSteps = 4;

// What a network is built with: its parts as they are, or each made a unit.
struct Dense {
  template <class M, class Signature = void>
  using Of = M;
  template <class Signature = void, class M>
  std::shared_ptr<M> Wrap(std::shared_ptr<M> module) const {
    return module;
  }
};
struct Sharded {
  template <class M, class Signature = void>
  using Of = FullyShard<M, Signature>;
  template <class Signature = void, class M>
  std::shared_ptr<FullyShard<M, Signature>> Wrap(
      std::shared_ptr<M> module) const {
    return MakeFullyShard<Signature>(std::move(module), context);
  }
  std::shared_ptr<FullyShardContext> context;
};

// Which data, and whose: networks may behave differently by rank.
struct Batch {
  int step;
  int micro;
  int rank;

  Tensor Normal(at::IntArrayRef shape) const {
    return at::randn(shape, Generator());
  }
  Tensor Integers(int64_t high, at::IntArrayRef shape) const {
    return at::randint(high, shape, Generator(), at::TensorOptions(at::kLong));
  }
  at::Generator Generator() const {
    return at::detail::createCPUGenerator(1000003 * step + 1009 * micro + rank);
  }
};

std::shared_ptr<nn::LinearImpl> Linear(int64_t in, int64_t out) {
  return std::make_shared<nn::LinearImpl>(nn::LinearOptions(in, out));
}

// 7 and 3 rows and a parameter of one row: uneven and empty shards over 4
// ranks.
template <class W>
struct Mlp : nn::Module {
  explicit Mlp(const W& w)
      : first(register_module("first", w.Wrap(Linear(5, 7)))),
        norm(register_module("norm", w.Wrap(std::make_shared<nn::LayerNormImpl>(
                                         nn::LayerNormOptions({7}))))),
        second(register_module("second", w.Wrap(Linear(7, 3)))),
        scale(register_parameter("scale", at::full({1}, 1.5))) {}

  Tensor forward(Tensor x) {
    return second->forward(norm->forward(first->forward(x).tanh())) * scale;
  }
  template <class Net>
  static Tensor Loss(Net& net, const Batch& b) {
    return net.forward(b.Normal({4, 5})).pow(2).mean();
  }

  std::shared_ptr<typename W::template Of<nn::LinearImpl>> first;
  std::shared_ptr<typename W::template Of<nn::LayerNormImpl>> norm;
  std::shared_ptr<typename W::template Of<nn::LinearImpl>> second;
  Tensor scale;
};

// One tensor under two names in one unit; the body between is another unit.
template <class W>
struct Tied : nn::Module {
  struct Table : nn::Module {
    explicit Table(Tensor table)
        : weight(register_parameter("weight", std::move(table))) {}
    Tensor weight;
  };

  explicit Tied(const W& w)
      : embedding(register_module("embedding",
                                  std::make_shared<Table>(at::randn({11, 6})))),
        body(register_module("body", w.Wrap(Linear(6, 6)))),
        head(register_module("head",
                             std::make_shared<Table>(embedding->weight))) {}

  Tensor forward(Tensor tokens) {
    const Tensor x = at::embedding(embedding->weight, tokens);
    return at::linear(body->forward(x).relu(), head->weight);
  }
  template <class Net>
  static Tensor Loss(Net& net, const Batch& b) {
    return net.forward(b.Integers(11, {3, 2})).pow(2).mean();
  }

  std::shared_ptr<Table> embedding;
  std::shared_ptr<typename W::template Of<nn::LinearImpl>> body;
  std::shared_ptr<Table> head;
};

// A frozen layer, a parameter that nobody uses, one that only rank 0 uses (in
// odd steps), one that is saved for backward as it is.
template <class W>
struct Partial : nn::Module {
  explicit Partial(const W& w)
      : frozen(Linear(5, 6)),
        layer(register_module("layer", w.Wrap(Linear(6, 6)))),
        unused(register_parameter("unused", at::randn({5, 2}))),
        sometimes(register_parameter("sometimes", at::randn({6}))),
        squared(register_parameter("squared", at::randn({6}))) {
    for (Tensor& p : frozen->parameters()) p.set_requires_grad(false);
    wrapped_frozen = register_module("frozen", w.Wrap(frozen));
  }

  Tensor forward(Tensor x, bool use) {
    x = layer->forward(wrapped_frozen->forward(x)) * (squared * squared);
    return use ? x * sometimes : x;
  }
  template <class Net>
  static Tensor Loss(Net& net, const Batch& b) {
    return net.forward(b.Normal({4, 5}), b.rank == 0 && b.step % 2 == 1)
        .pow(2)
        .mean();
  }

  std::shared_ptr<nn::LinearImpl> frozen;
  std::shared_ptr<typename W::template Of<nn::LinearImpl>> wrapped_frozen;
  std::shared_ptr<typename W::template Of<nn::LinearImpl>> layer;
  Tensor unused;
  Tensor sometimes;
  Tensor squared;
};

// One unit called twice, once on top of the other and once beside it.
template <class W>
struct Twice : nn::Module {
  explicit Twice(const W& w)
      : layer(register_module("layer", w.Wrap(Linear(7, 7)))),
        in(register_module("in", w.Wrap(Linear(3, 7)))) {}

  Tensor forward(Tensor x) {
    x = in->forward(x);
    const Tensor once = layer->forward(x).tanh();
    return layer->forward(once) + layer->forward(x.sin());
  }
  template <class Net>
  static Tensor Loss(Net& net, const Batch& b) {
    return net.forward(b.Normal({4, 3})).pow(2).mean();
  }

  std::shared_ptr<typename W::template Of<nn::LinearImpl>> layer;
  std::shared_ptr<typename W::template Of<nn::LinearImpl>> in;
};

// Tuples, vectors and optionals; a result that nobody uses, one that is a view
// and is modified in place, one that is a parameter.
struct BranchesImpl : nn::Module {
  BranchesImpl()
      : weight(register_parameter("weight", at::randn({6, 4}))),
        bias(register_parameter("bias", at::randn({6}))) {}
  std::tuple<Tensor, std::vector<Tensor>, std::optional<Tensor>> forward(
      Tensor x, std::optional<Tensor> y = std::nullopt, double factor = 2) {
    Tensor z = at::linear(x, weight, bias) * factor;
    if (y.has_value()) z = z + at::linear(*y, weight);
    return {(z * 2).slice(1, 0, 3), {z.sin(), z.cos()}, bias};
  }
  Tensor weight;
  Tensor bias;
};
template <class W>
struct Structured : nn::Module {
  explicit Structured(const W& w)
      : in(register_module("in", w.Wrap(Linear(4, 4)))),
        branches(register_module("branches",
                                 w.Wrap(std::make_shared<BranchesImpl>()))) {}

  Tensor forward(Tensor x) {
    const Tensor h = in->forward(x);
    auto [view, list, bias] = branches->forward(h, h.relu(), 3.0);
    view.relu_();
    const auto [again, rest, same] =
        branches->forward(h, std::optional<Tensor>(), 1.0);
    return view.sum() + (list[1] * *bias).sum() + again.sum() * 0.5;
  }
  template <class Net>
  static Tensor Loss(Net& net, const Batch& b) {
    return net.forward(b.Normal({4, 4}));
  }

  std::shared_ptr<typename W::template Of<nn::LinearImpl>> in;
  std::shared_ptr<typename W::template Of<BranchesImpl>> branches;
};

// Units as elements of a Sequential, which is a unit itself, and an LSTM, which
// keeps its own list of its weights.
template <class W>
struct Recurrent : nn::Module {
  explicit Recurrent(const W& w)
      : lstm(register_module("lstm",
                             w.Wrap(std::make_shared<nn::LSTMImpl>(
                                 nn::LSTMOptions(4, 3).num_layers(2))))) {
    auto layers = std::make_shared<nn::SequentialImpl>();
    layers->push_back(w.template Wrap<Tensor(Tensor)>(Linear(3, 9)));
    layers->push_back(w.template Wrap<Tensor(Tensor)>(Linear(9, 2)));
    tail = register_module("tail", w.Wrap(std::move(layers)));
  }

  Tensor forward(Tensor x) {
    return tail->forward(std::get<0>(lstm->forward(x)));
  }
  template <class Net>
  static Tensor Loss(Net& net, const Batch& b) {
    return net.forward(b.Normal({5, 2, 4})).pow(2).mean();
  }

  std::shared_ptr<typename W::template Of<nn::LSTMImpl>> lstm;
  std::shared_ptr<typename W::template Of<nn::SequentialImpl>> tail;
};

using Optimizer = std::unique_ptr<torch::optim::Optimizer>;
using MakeOptimizer = std::function<Optimizer(std::vector<Tensor>)>;

const std::map<std::string, MakeOptimizer>& Optimizers() {
  static const auto* const kOptimizers =
      new std::map<std::string, MakeOptimizer>{
          {"SGD",
           [](std::vector<Tensor> p) {
             return std::make_unique<torch::optim::SGD>(
                 std::move(p),
                 torch::optim::SGDOptions(0.05).momentum(0.9).weight_decay(
                     0.01));
           }},
          {"Adam",
           [](std::vector<Tensor> p) {
             return std::make_unique<torch::optim::Adam>(
                 std::move(p), torch::optim::AdamOptions(0.01).amsgrad(true));
           }},
          {"AdamW",
           [](std::vector<Tensor> p) {
             return std::make_unique<torch::optim::AdamW>(
                 std::move(p), torch::optim::AdamWOptions(0.01));
           }},
      };
  return *kOptimizers;
}

// Values by canonical name; a parameter with two names once.
using Values = std::map<std::string, Tensor>;

Values Parameters(const nn::Module& module) {
  Values values;
  for (const auto& p : module.named_parameters()) {
    values[absl::StrReplaceAll(
        p.key(), {{absl::StrCat(kFsdpSegment, "."), ""}})] = p.value();
  }
  return values;
}

// The generator of LibTorch is the process's: one rank at a time builds.
template <class T, class... Args>
std::shared_ptr<T> Seeded(Args&&... args) {
  static absl::Mutex mu(absl::kConstInit);
  absl::MutexLock lock(&mu);
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  generator.set_current_seed(17);
  return std::make_shared<T>(std::forward<Args>(args)...);
}

struct Snapshot {
  Values gradients;  // undefined where there is none
  Values parameters;
};

// What training gives, step by step, computed by one dense model.
template <template <class> class Net>
std::vector<Snapshot> DenseTraining(int world_size, int micro_batches,
                                    const MakeOptimizer& make_optimizer) {
  at::set_num_threads(1);  // as the ranks: kernels split their sums by threads
  auto net = Seeded<Net<Dense>>(Dense());
  Values parameters = Parameters(*net);
  Optimizer optimizer = make_optimizer(net->parameters());
  std::vector<Snapshot> snapshots;
  for (int step = 0; step < kSteps; ++step) {
    Values total;
    for (int micro = 0; micro < micro_batches; ++micro) {
      Values sum;
      for (int rank = 0; rank < world_size; ++rank) {
        net->zero_grad();
        Net<Dense>::Loss(*net, Batch{step, micro, rank}).backward();
        for (auto& [name, p] : parameters) {
          if (!p.grad().defined()) continue;
          Tensor& s = sum[name];
          s = s.defined() ? s + p.grad() : p.grad().clone();
        }
      }
      for (auto& [name, s] : sum) {
        s.mul_(1.0 / world_size);
        Tensor& t = total[name];
        t = t.defined() ? t + s : s;
      }
    }
    Snapshot snapshot;
    at::NoGradGuard no_grad;
    for (auto& [name, p] : parameters) {
      p.mutable_grad() = total[name].defined() ? total[name].clone() : Tensor();
      snapshot.gradients[name] = total[name];
    }
    optimizer->step();
    for (auto& [name, p] : parameters) {
      snapshot.parameters[name] = p.detach().clone();
    }
    snapshots.push_back(std::move(snapshot));
  }
  return snapshots;
}

// `part` is this rank's shard of `whole`, going by the sharding of `parameter`.
void ExpectShard(const Tensor& parameter, const Tensor& part,
                 const Tensor& whole, const std::string& what) {
  const std::optional<Sharding> sharding =
      ShardingTable::Global().Find(parameter);
  ASSERT_TRUE(sharding.has_value()) << what;
  ASSERT_EQ(ToDims(whole.sizes()), sharding->layout.shape()) << what;
  const std::optional<Dims> shape =
      sharding->layout.LocalShape(sharding->holder);
  ASSERT_EQ(ToDims(part.sizes()), shape) << what;
  const std::vector<LocalBox> boxes =
      sharding->layout.BoxesOf(sharding->holder);
  ASSERT_LE(boxes.size(), 1) << what;
  if (boxes.empty()) return;
  const Box& box = boxes[0].box;
  EXPECT_TRUE(part.equal(whole.narrow(0, box.lo[0], box.extent(0)))) << what;
}

// Runs `body` on ranks that are threads. A rank whose check failed leaves, and
// ends the others thereby.
void RunRanks(int world_size,
              const std::function<void(int rank, Communicator& comm)>& body) {
  const std::vector<absl::Status> statuses =
      RunRankThreads(world_size, [&](Communicator& comm) -> absl::Status {
        at::set_num_threads(1);
        SCOPED_TRACE(absl::StrCat("rank ", comm.rank(), " of ", world_size));
        DSD_RETURN_IF_ERROR(TorchToStatus([&] { body(comm.rank(), comm); }));
        if (!::testing::Test::HasFatalFailure()) return absl::OkStatus();
        return absl::InternalError("a check failed");
      });
  for (const absl::Status& status : statuses) {
    // A test that ends the communicator looks at that itself.
    EXPECT_TRUE(status.ok() || absl::IsAborted(status)) << status;
  }
}

struct Case {
  int world_size = 4;
  std::string optimizer = "AdamW";
  int micro_batches = 1;
  int64_t bucket_bytes = FullyShardOptions().bucket_bytes;
};

template <template <class> class Net>
void ExpectEqualTraining(const Case& c) {
  SCOPED_TRACE(absl::StrCat(c.world_size, " ranks, ", c.optimizer, ", ",
                            c.micro_batches, " micro-batches, buckets of ",
                            c.bucket_bytes));
  const MakeOptimizer& make_optimizer = Optimizers().at(c.optimizer);
  const std::vector<Snapshot> expected =
      DenseTraining<Net>(c.world_size, c.micro_batches, make_optimizer);
  RunRanks(c.world_size, [&](int rank, Communicator& comm) {
    FullyShardOptions options;
    options.bucket_bytes = c.bucket_bytes;
    const auto context = std::make_shared<FullyShardContext>(&comm, options);
    // The root is a unit too.
    const auto net =
        MakeFullyShard(Seeded<Net<Sharded>>(Sharded{context}), context);
    const Values parameters = Parameters(*net);
    Optimizer optimizer = make_optimizer(net->parameters());
    for (int step = 0; step < kSteps; ++step) {
      optimizer->zero_grad();
      for (int micro = 0; micro < c.micro_batches; ++micro) {
        Net<Sharded>::Loss(*net, Batch{step, micro, rank}).backward();
      }
      ASSERT_EQ(parameters.size(), expected[step].gradients.size());
      for (const auto& [name, p] : parameters) {
        const Tensor& gradient = expected[step].gradients.at(name);
        ASSERT_EQ(p.grad().defined(), gradient.defined()) << name;
        if (gradient.defined()) {
          ExpectShard(p, p.grad(), gradient,
                      absl::StrCat("step ", step, ", gradient of ", name));
        }
      }
      optimizer->step();
      for (const auto& [name, p] : parameters) {
        ExpectShard(p, p.detach(), expected[step].parameters.at(name),
                    absl::StrCat("step ", step, ", ", name));
      }
    }
    EXPECT_TRUE(context->status().ok());
  });
}

template <template <class> class Net>
void ExpectEqualTrainingInAllCases() {
  for (const int world_size : {1, 2, 4}) {
    for (const auto& [optimizer, make] : Optimizers()) {
      ExpectEqualTraining<Net>({world_size, optimizer});
    }
    ExpectEqualTraining<Net>({world_size, "AdamW", /*micro_batches=*/3});
    ExpectEqualTraining<Net>(
        {world_size, "Adam", /*micro_batches=*/2, /*bucket_bytes=*/0});
    ExpectEqualTraining<Net>(
        {world_size, "SGD", /*micro_batches=*/1, /*bucket_bytes=*/64});
  }
}

TEST(FullyShardTest, MlpEqualsDense) { ExpectEqualTrainingInAllCases<Mlp>(); }
TEST(FullyShardTest, TiedWeightsEqualDense) {
  ExpectEqualTrainingInAllCases<Tied>();
}
TEST(FullyShardTest, FrozenAndUnusedParametersEqualDense) {
  ExpectEqualTrainingInAllCases<Partial>();
}
TEST(FullyShardTest, UnitCalledSeveralTimesEqualsDense) {
  ExpectEqualTrainingInAllCases<Twice>();
}
TEST(FullyShardTest, StructuredInputsAndOutputsEqualDense) {
  ExpectEqualTrainingInAllCases<Structured>();
}
TEST(FullyShardTest, SequentialAndLstmEqualDense) {
  ExpectEqualTrainingInAllCases<Recurrent>();
}

TEST(FullyShardTest, WorldOfOneNeedsNoCommunicator) {
  const auto context = std::make_shared<FullyShardContext>(nullptr);
  const auto net =
      MakeFullyShard(Seeded<Mlp<Sharded>>(Sharded{context}), context);
  const auto dense = Seeded<Mlp<Dense>>(Dense());
  const Batch batch{0, 0, 0};
  Mlp<Sharded>::Loss(*net, batch).backward();
  Mlp<Dense>::Loss(*dense, batch).backward();
  const Values expected = Parameters(*dense);
  for (const auto& [name, p] : Parameters(*net)) {
    EXPECT_TRUE(p.grad().equal(expected.at(name).grad())) << name;
  }
}

// Passes that overlap: several forward before the first backward, one graph
// twice, a graph of more calls of a unit than the unit has seen since. Sums are
// taken in another order than one after the other.
TEST(FullyShardTest, OverlappingPassesAddUp) {
  RunRanks(2, [](int rank, Communicator& comm) {
    const auto context = std::make_shared<FullyShardContext>(&comm);
    const auto gradients_of = [&](auto&& train) {
      const auto net =
          MakeFullyShard(Seeded<Twice<Sharded>>(Sharded{context}), context);
      train(*net);
      Values gradients;
      for (const auto& [name, p] : Parameters(*net)) gradients[name] = p.grad();
      return gradients;
    };
    const auto loss = [rank](auto& net, int step) {
      return Twice<Sharded>::Loss(net, Batch{step, 0, rank});
    };
    // One call of the unit that Loss calls twice.
    const auto other = [rank](auto& net) {
      const Tensor x = Batch{9, 0, rank}.Normal({2, 7}).set_requires_grad(true);
      return net.inner()->layer->forward(x).pow(2).sum();
    };
    const Values expected = gradients_of([&](auto& net) {
      for (const int step : {0, 1, 0}) loss(net, step).backward();
      for (int i = 0; i < 2; ++i) other(net).backward();
    });
    const Values overlapping = gradients_of([&](auto& net) {
      const Tensor a = loss(net, 0);
      const Tensor b = loss(net, 1);
      other(net).backward();
      a.backward({}, /*retain_graph=*/true);
      const Tensor c = other(net);
      b.backward();
      a.backward();
      c.backward();
    });
    for (const auto& [name, gradient] : overlapping) {
      EXPECT_TRUE(gradient.allclose(expected.at(name), 1e-5, 1e-6)) << name;
    }
  });
}

TEST(FullyShardTest, EvaluationEqualsDenseAndKeepsShards) {
  const Batch batch{0, 0, 0};
  const Tensor expected =
      Mlp<Dense>::Loss(*Seeded<Mlp<Dense>>(Dense()), batch).detach();
  RunRanks(3, [&](int rank, Communicator& comm) {
    const auto context = std::make_shared<FullyShardContext>(&comm);
    const auto net =
        MakeFullyShard(Seeded<Mlp<Sharded>>(Sharded{context}), context);
    at::NoGradGuard no_grad;
    EXPECT_TRUE(Mlp<Sharded>::Loss(*net, batch).equal(expected));
    const Tensor weight = Parameters(*net).at("first.weight");
    EXPECT_EQ(weight.size(0), rank == 2 ? 1 : 3);
  });
}

// Remembers the memory that its weight had in forward().
struct WitnessImpl : nn::Module {
  WitnessImpl() : weight(register_parameter("weight", at::randn({8, 4}))) {}
  Tensor forward(Tensor x) {
    seen = weight.variable_data();
    return at::linear(x, weight);
  }
  Tensor weight;
  Tensor seen;
};

TEST(FullyShardTest, WholeParametersExistOnlyInsideTheCalls) {
  RunRanks(2, [](int rank, Communicator& comm) {
    const auto context = std::make_shared<FullyShardContext>(&comm);
    const auto unit = MakeFullyShard(Seeded<WitnessImpl>(), context);
    Tensor y = unit->forward(Batch{0, 0, rank}.Normal({2, 4}));
    const c10::Storage whole = unit->inner()->seen.storage();
    EXPECT_EQ(whole.nbytes(), 0);
    EXPECT_EQ(unit->inner()->weight.size(0), 4);
    EXPECT_EQ(unit->inner()->weight.storage().nbytes(), 4 * 4 * 4);
    size_t bytes_in_backward = 0;
    y.register_hook(
        [&](const at::TensorBase&) { bytes_in_backward = whole.nbytes(); });
    y.sum().backward();
    EXPECT_EQ(bytes_in_backward, 8 * 4 * 4);
    EXPECT_EQ(whole.nbytes(), 0);
    EXPECT_EQ(unit->inner()->weight.grad().sizes(), at::IntArrayRef({4, 4}));
  });
}

// Shards are back, earlier gradients too, and training goes on as if nothing
// had been.
TEST(FullyShardTest, ExceptionsLeaveShards) {
  const std::vector<Snapshot> expected =
      DenseTraining<Twice>(2, 1, Optimizers().at("Adam"));
  RunRanks(2, [&](int rank, Communicator& comm) {
    const auto context = std::make_shared<FullyShardContext>(&comm);
    const auto net =
        MakeFullyShard(Seeded<Twice<Sharded>>(Sharded{context}), context);
    const Values parameters = Parameters(*net);
    std::map<std::string, Dims> shapes;
    for (const auto& [name, p] : parameters) shapes[name] = ToDims(p.sizes());
    const auto expect_shards = [&](const Values& gradients) {
      for (const auto& [name, p] : parameters) {
        EXPECT_EQ(ToDims(p.sizes()), shapes[name]) << name;
        EXPECT_TRUE(p.grad().equal(gradients.at(name))) << name;
      }
    };
    Optimizer optimizer = Optimizers().at("Adam")(net->parameters());
    for (int step = 0; step < kSteps; ++step) {
      const Batch batch{step, 0, rank};
      net->zero_grad();
      Twice<Sharded>::Loss(*net, batch).backward();
      Values gradients;
      for (const auto& [name, p] : parameters) {
        gradients[name] = p.grad().clone();
      }

      // In the middle of backward, while units are whole.
      const Tensor x = batch.Normal({4, 7}).set_requires_grad(true);
      const Tensor h = net->inner()->layer->forward(x);
      h.register_hook([](const at::TensorBase&) {
        throw std::runtime_error("stumbled in backward");
      });
      const Tensor loss = net->inner()->layer->forward(h.tanh()).sum();
      EXPECT_THROW(loss.backward(), std::runtime_error);
      expect_shards(gradients);

      // In forward: the shapes do not fit.
      EXPECT_ANY_THROW(net->forward(batch.Normal({4, 4})));
      expect_shards(gradients);

      // Refused.
      const absl::Status status = TorchToStatus([&] {
        Twice<Sharded>::Loss(*net, batch)
            .backward({}, /*retain_graph=*/true, /*create_graph=*/true);
      });
      EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
      EXPECT_THAT(status.message(), HasSubstr("create_graph"));
      expect_shards(gradients);

      optimizer->step();
      for (const auto& [name, p] : parameters) {
        ExpectShard(p, p.detach(), expected[step].parameters.at(name),
                    absl::StrCat("step ", step, ", ", name));
      }
    }
    EXPECT_TRUE(context->status().ok());
  });
}

TEST(FullyShardTest, GradientOfAnInputAloneLeavesParametersWithout) {
  RunRanks(2, [](int rank, Communicator& comm) {
    const auto context = std::make_shared<FullyShardContext>(&comm);
    const auto unit = MakeFullyShard(Seeded<WitnessImpl>(), context);
    const Tensor x = Batch{0, 0, rank}.Normal({2, 4}).set_requires_grad(true);
    const Tensor y = unit->forward(x);
    const auto gradients = torch::autograd::grad({y.sum()}, {x});
    const auto dense = Seeded<WitnessImpl>();
    EXPECT_TRUE(gradients[0].equal(
        torch::autograd::grad({dense->forward(x).sum()}, {x})[0]));
    EXPECT_FALSE(unit->inner()->weight.grad().defined());
    EXPECT_EQ(unit->inner()->weight.size(0), 4);
  });
}

TEST(FullyShardTest, DeadCommunicatorIsAStatusErrorAndRemembered) {
  RunRanks(2, [](int rank, Communicator& comm) {
    const auto context = std::make_shared<FullyShardContext>(&comm);
    const auto unit = MakeFullyShard(Seeded<WitnessImpl>(), context);
    const Tensor x = Batch{0, 0, rank}.Normal({2, 4});
    const Tensor y = unit->forward(x);
    if (rank == 1) comm.Abort(absl::InternalError("rank 1 has had enough"));
    const absl::Status status = TorchToStatus([&] { y.sum().backward(); });
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
    EXPECT_THAT(status.message(),
                AllOf(HasSubstr("FullyShard unit"), HasSubstr("{weight}"),
                      HasSubstr("rank 1 has had enough")));
    EXPECT_EQ(context->status(), status);
    EXPECT_EQ(unit->inner()->weight.size(0), 4);
  });
}

struct ScalarImpl : nn::Module {
  ScalarImpl() { register_parameter("temperature", at::ones({})); }
  Tensor forward(Tensor x) { return x; }
};
struct StorageTieImpl : nn::Module {
  StorageTieImpl() {
    const Tensor table = at::randn({4, 4});
    register_parameter("a", table);
    register_parameter("b", table.view({16}));
  }
  Tensor forward(Tensor x) { return x; }
};
struct SharingImpl : nn::Module {
  explicit SharingImpl(const Tensor& weight) {
    register_parameter("borrowed", weight);
  }
  Tensor forward(Tensor x) { return x; }
};

TEST(FullyShardTest, RefusesWhatItCannotShard) {
  const auto context = std::make_shared<FullyShardContext>(nullptr);
  const auto status_of = [&](auto module) {
    return TorchToStatus([&] { MakeFullyShard(std::move(module), context); });
  };
  absl::Status status = status_of(std::make_shared<ScalarImpl>());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(),
              AllOf(HasSubstr("\"temperature\""), HasSubstr("scalar")));

  status = status_of(std::make_shared<StorageTieImpl>());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("\"a\""), HasSubstr("\"b\"")));

  status = status_of(std::shared_ptr<WitnessImpl>());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("module is null"));
  status = status_of(nn::Linear(nullptr));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  status = TorchToStatus(
      [&] { MakeFullyShard(std::make_shared<WitnessImpl>(), nullptr); });
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("FullyShardContext is null"));

  const auto owner = MakeFullyShard(std::make_shared<WitnessImpl>(), context);
  status = status_of(std::make_shared<SharingImpl>(owner->inner()->weight));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(),
              AllOf(HasSubstr("\"borrowed\""), HasSubstr("one unit")));
}

TEST(FullyShardTest, NoticesForeignHandsOnAParameter) {
  const auto context = std::make_shared<FullyShardContext>(nullptr);
  const auto unit = MakeFullyShard(std::make_shared<WitnessImpl>(), context);
  const Tensor x = at::ones({1, 4});
  Tensor& weight = unit->inner()->weight;

  // New data of the right kind is the shard from now on.
  weight.set_data(at::full({8, 4}, 2.0));
  EXPECT_EQ(unit->forward(x).sum().item<double>(), 64);

  weight.set_data(at::ones({5, 4}));
  absl::Status status = TorchToStatus([&] { unit->forward(x); });
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(
      status.message(),
      AllOf(HasSubstr("\"weight\""), HasSubstr("[8, 4]"), HasSubstr("[5, 4]")));
  weight.set_data(at::ones({8, 4}, at::kDouble));
  status = TorchToStatus([&] { unit->forward(x); });
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
}

// With 2 ranks, where a shard differs from the whole.
TEST(FullyShardTest, RefusesAutogradOnShards) {
  RunRanks(2, [](int, Communicator& comm) {
    const auto context = std::make_shared<FullyShardContext>(&comm);
    const auto unit = MakeFullyShard(Seeded<WitnessImpl>(), context);
    const Tensor penalty = unit->inner()->weight.pow(2).sum();
    const absl::Status status = TorchToStatus([&] {
      unit->forward(at::ones({1, 4}));
    });
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(status.message(), HasSubstr("outside of forward()"));
  });
}

}  // namespace
}  // namespace dsd
