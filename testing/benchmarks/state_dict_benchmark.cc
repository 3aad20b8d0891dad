// SPDX-License-Identifier: Apache-2.0
//
// Get and set of many small tensors, beside PyTorch doing the same in the same
// run. Prints wall and CPU seconds and the ratio of the walls, and fails if the
// results differ.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ATen/Parallel.h"
#include "ATen/core/grad_mode.h"
#include "ATen/ops/full.h"
#include "ATen/ops/scalar_tensor.h"
#include "ATen/ops/tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/benchmarks/measure.h"
#include "dsd/testing/harness/rank_processes.h"
#include "libdeflate.h"
#include "nlohmann/json.hpp"
#include "torch/nn/module.h"
#include "torch/optim/adamw.h"

namespace dsd {
namespace {

using Json = nlohmann::json;

// In PyTorch a module's own parameters are in the order of registration, too.
constexpr const char* kNames[] = {"down", "gate", "up"};
constexpr int kRuns = 5;

struct Size {
  int layers;
  int experts;

  int params() const { return layers * experts * 3; }
};

Seconds Least(const Seconds& a, const Seconds& b) {
  return a.wall < b.wall ? a : b;
}

at::Tensor Numbers(int index, double plus, double scale) {
  const double first = index % 1024 + plus;
  return at::tensor({scale * first, scale * (first + 0.25),
                     scale * (first + 0.5), scale * (first + 0.75)},
                    c10::kFloat);
}

struct Node : torch::nn::Module {};

using Distribute = std::function<at::Tensor(at::Tensor)>;

// A model with the state of AdamW after `step` steps; 0: all zeros.
struct Job {
  Job(Size size, int step, const Distribute& distribute) {
    const double scale = step == 0 ? 0 : 1;
    auto layers = std::make_shared<Node>();
    model.register_module("layers", layers);
    int index = 0;
    for (int layer = 0; layer < size.layers; ++layer) {
      auto experts = std::make_shared<Node>();
      layers->register_module(absl::StrCat(layer), experts);
      for (int i = 0; i < size.experts; ++i) {
        auto expert = std::make_shared<Node>();
        experts->register_module(absl::StrCat(i), expert);
        for (const char* name : kNames) {
          expert->register_parameter(name,
                                     distribute(Numbers(index++, 0, scale)));
        }
      }
    }
    optimizer = std::make_unique<torch::optim::AdamW>(
        model.parameters(), torch::optim::AdamWOptions(step == 0 ? 0.1 : 0.5));
    index = 0;
    for (const at::Tensor& param : model.parameters()) {
      auto state = std::make_unique<torch::optim::AdamWParamState>();
      state->step(step);
      state->exp_avg(distribute(Numbers(index, 1, scale)));
      state->exp_avg_sq(distribute(Numbers(index, 2, scale)));
      optimizer->state()[param.unsafeGetTensorImpl()] = std::move(state);
      ++index;
    }
  }

  Node model;
  std::unique_ptr<torch::optim::AdamW> optimizer;
};

at::Tensor Whole(at::Tensor tensor) { return tensor; }

class Crc {
 public:
  void Add(const void* data, size_t size) {
    crc_ = libdeflate_crc32(crc_, data, size);
  }
  void Add(const std::string& text) { Add(text.data(), text.size()); }
  void Add(const Value& value) {
    const at::Tensor tensor =
        value.get_if<TensorValue>()->Local()->contiguous();
    Add(tensor.data_ptr(), tensor.nbytes());
  }
  uint32_t value() const { return crc_; }

 private:
  uint32_t crc_ = 0;
};

// As in state_dict_peer.py.
uint32_t DigestOf(const ModelAndOptimizerStateDict& dicts) {
  Crc crc;
  for (size_t i = 0; i < dicts.model.size(); ++i) {
    crc.Add(dicts.model.key_text(i));
    crc.Add(dicts.model.value(i));
  }
  const StateDict& state = *dicts.optimizer.Find("state")->get_if<StateDict>();
  for (size_t i = 0; i < state.size(); ++i) {
    const StateDict& entries = *state.value(i).get_if<StateDict>();
    for (size_t k = 0; k < entries.size(); ++k) {
      crc.Add(absl::StrCat(state.key_text(i), ".", entries.key_text(k)));
      crc.Add(entries.value(k));
    }
  }
  for (const Value& value :
       *dicts.optimizer.Find("param_groups")->get_if<Value::List>()) {
    const StateDict& group = *value.get_if<StateDict>();
    const double lr = *group.Find("lr")->get_if<double>();
    crc.Add(&lr, sizeof(lr));
    for (const Value& name : *group.Find("params")->get_if<Value::List>()) {
      crc.Add(*name.get_if<std::string>());
    }
  }
  return crc.value();
}

// Of calls fn(i) for all i in [0, count), by as many threads as there are
// cores.
template <class Fn>
Seconds MeasureInThreads(size_t count, Fn fn) {
  return Measure([&] {
    const size_t parts = std::max(1, at::get_num_threads());
    std::vector<std::thread> threads;
    for (size_t part = 0; part < parts; ++part) {
      threads.emplace_back([&, part] {
        const at::NoGradGuard no_grad;
        for (size_t i = count * part / parts; i < count * (part + 1) / parts;
             ++i) {
          fn(i);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  });
}

// What LibTorch alone takes for the tensors of a get and a set: no names, no
// dicts.
struct Bare {
  Seconds get;  // detach() of each, and a scalar for each step
  Seconds set;  // copy_() into each
};

Bare RunBare(const Job& job) {
  std::vector<at::Tensor> live = job.model.parameters();
  const size_t params = live.size();
  for (size_t i = 0; i < params; ++i) {
    const auto& state = static_cast<const torch::optim::AdamWParamState&>(
        *job.optimizer->state().at(live[i].unsafeGetTensorImpl()));
    live.push_back(state.exp_avg());
    live.push_back(state.exp_avg_sq());
  }
  Bare least;
  for (int run = 0; run < kRuns; ++run) {
    std::vector<at::Tensor> got(live.size() + params);
    const Seconds get = MeasureInThreads(got.size(), [&](size_t i) {
      got[i] = i < live.size() ? live[i].detach() : at::scalar_tensor(1.0f);
    });
    std::vector<at::Tensor> from;
    for (const at::Tensor& tensor : live) from.push_back(tensor.clone());
    const Seconds set = MeasureInThreads(
        live.size(), [&](size_t i) { live[i].copy_(from[i]); });
    least.get = run == 0 ? get : Least(least.get, get);
    least.set = run == 0 ? set : Least(least.set, set);
  }
  return least;
}

struct Local {
  Seconds first_get;
  Seconds second_get;
  Seconds get_after_step;
  Seconds set;
  Bare bare;
  uint32_t digest;
  uint32_t set_digest;
};

Local RunLocal(Size size) {
  Local out;
  Job job(size, 1, Whole);
  ModelAndOptimizerStateDict dicts;
  for (int run = 0; run < kRuns; ++run) {
    std::unique_ptr<StateDictSession> session;
    dicts = {};
    const Seconds first = Measure([&] {
      session = Must(StateDictSession::Create(job.model, *job.optimizer));
      dicts = Must(session->Get());
    });
    const Seconds second = Measure([&] { dicts = Must(session->Get()); });
    for (const auto& [key, state] : job.optimizer->state()) {
      static_cast<torch::optim::AdamWParamState&>(*state).step(2 + run);
    }
    const Seconds stepped = Measure([&] { dicts = Must(session->Get()); });
    for (const auto& [key, state] : job.optimizer->state()) {
      static_cast<torch::optim::AdamWParamState&>(*state).step(1);
    }
    dicts = Must(session->Get());
    out.first_get = run == 0 ? first : Least(out.first_get, first);
    out.second_get = run == 0 ? second : Least(out.second_get, second);
    out.get_after_step =
        run == 0 ? stepped : Least(out.get_after_step, stepped);
  }
  out.digest = DigestOf(dicts);
  for (int run = 0; run < kRuns; ++run) {
    Job other(size, 0, Whole);
    const Seconds set = Measure([&] {
      Must(SetStateDict(other.model, *other.optimizer, dicts.model,
                        dicts.optimizer));
    });
    out.set = run == 0 ? set : Least(out.set, set);
    out.set_digest =
        DigestOf(Must(GetStateDict(other.model, *other.optimizer)));
  }
  dicts = {};
  out.bare = RunBare(job);
  return out;
}

DSD_RANK_PROGRAM(Gather) {
  at::set_num_threads(1);
  const std::vector<std::string> words = absl::StrSplit(rank.argument(), ' ');
  Size size;
  int runs;
  if (words.size() != 3 || !absl::SimpleAtoi(words[0], &size.layers) ||
      !absl::SimpleAtoi(words[1], &size.experts) ||
      !absl::SimpleAtoi(words[2], &runs)) {
    return absl::InvalidArgumentError(rank.argument());
  }
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("gloo"));
  DSD_ASSIGN_OR_RETURN(
      const Layout layout,
      Layout::FromPlacements({4}, DeviceMesh::Iota({rank.world_size()}),
                             {Shard(0)}));
  const int64_t elements = 4 / rank.world_size();
  absl::Status status;
  Job job(size, 1, [&](const at::Tensor& whole) {
    at::Tensor shard =
        whole.narrow(0, rank.rank() * elements, elements).clone();
    status.Update(ShardingTable::Global().Set(shard, layout, rank.rank()));
    return shard;
  });
  DSD_RETURN_IF_ERROR(status);
  StateDictOptions options;
  options.full_state_dict = true;
  ModelAndOptimizerStateDict dicts;
  Seconds model;
  Seconds optimizer;
  for (int run = 0; run < runs; ++run) {
    dicts = {};
    DSD_RETURN_IF_ERROR(comm->Barrier());
    const Seconds first = Measure([&] {
      dicts.model = Must(GetModelStateDict(job.model, comm.get(), options));
    });
    DSD_RETURN_IF_ERROR(comm->Barrier());
    const Seconds second = Measure([&] {
      dicts.optimizer = Must(GetOptimizerStateDict(job.model, *job.optimizer,
                                                   comm.get(), options));
    });
    model = run == 0 ? first : Least(model, first);
    optimizer = run == 0 ? second : Least(optimizer, second);
  }
  const auto record = [&](const char* name, const Seconds& seconds) {
    rank.Record(name, absl::StrFormat("%.9f %.9f", seconds.wall, seconds.cpu));
  };
  record("model", model);
  record("optimizer", optimizer);
  rank.Record("digest", absl::StrCat(DigestOf(dicts)));
  return comm->Shutdown();
}

struct Gathered {
  Seconds model;
  Seconds optimizer;
  uint32_t digest = 0;
};

Gathered RunGather(int world_size, Size size, int runs) {
  RankRunOptions options;
  options.argument = absl::StrCat(size.layers, " ", size.experts, " ", runs);
  options.timeout = absl::Minutes(5);
  Gathered out;
  for (const RankResult& rank : RunRanks(world_size, "Gather", options)) {
    if (rank.end != RankResult::End::kReturned || !rank.status.ok()) {
      std::cerr << rank.status << "\n" << rank.output << std::endl;
      std::exit(1);
    }
    const auto add = [&](const char* name, Seconds& to) {
      const std::vector<std::string> words =
          absl::StrSplit(rank.values.at(name), ' ');
      to.wall = std::max(to.wall, std::stod(words[0]));
      to.cpu += std::stod(words[1]);
    };
    add("model", out.model);
    add("optimizer", out.optimizer);
    const uint32_t digest = std::stoul(rank.values.at("digest"));
    if (out.digest != 0 && out.digest != digest) {
      std::cerr << "ranks gathered different values" << std::endl;
      std::exit(1);
    }
    out.digest = digest;
  }
  return out;
}

class Table {
 public:
  explicit Table(bool with_peer) : with_peer_(with_peer) {
    absl::PrintF("%-46s %18s %18s %8s\n", "work: seconds wall (CPU)", "PyTorch",
                 "dsd", "ratio");
  }

  // `peer` null: it was not run.
  void Row(const std::string& work, const Json& peer, const Seconds& dsd) {
    const bool ran = peer.is_object();
    absl::PrintF(
        "%-46s %18s %18s %8s\n", work,
        ran ? Show({peer["wall"].get<double>(), peer["cpu"].get<double>()})
            : "-",
        Show(dsd),
        ran ? absl::StrFormat("%.0fx", peer["wall"].get<double>() / dsd.wall)
            : "-");
    std::fflush(stdout);
  }

  void Compare(const std::string& what, const Json& peer, uint32_t dsd) {
    if (!with_peer_) return;
    const bool equal = !peer.is_null() && peer.get<uint32_t>() == dsd;
    same_ &= equal;
    absl::PrintF("  results of %s: %s\n", what,
                 equal ? "equal to PyTorch's" : "NOT EQUAL");
  }

  void CompareOwn(const std::string& what, uint32_t a, uint32_t b) {
    same_ &= a == b;
    absl::PrintF("  results of %s: %s\n", what, a == b ? "equal" : "NOT EQUAL");
  }

  bool same() const { return same_; }

 private:
  static std::string Show(const Seconds& seconds) {
    return absl::StrFormat("%.4f (%.4f)", seconds.wall, seconds.cpu);
  }

  const bool with_peer_;
  bool same_ = true;
};

// Null if the peer did not run.
Json Of(const Json& peer, const char* name) {
  return peer.is_null() ? Json() : peer[name];
}

int Run(const std::string& peer, bool quick, bool with_peer, bool peer_set,
        const std::string& only) {
  const Size small = quick ? Size{58, 16} : Size{58, 256};
  Table table(with_peer);
  for (const int times : {1, 4}) {
    if (only == "gather") break;
    const Size size{small.layers, small.experts * times};
    const Local dsd = RunLocal(size);
    // Its set is quadratic: at 4x the work it would take 20 minutes.
    const bool with_set = with_peer && peer_set && times == 1;
    Json other;
    if (with_peer) {
      other = RunPeer(absl::StrCat(peer, " local ", size.layers, " ",
                                   size.experts, with_set ? " --set" : ""));
    }
    const std::string of = absl::StrCat(" of ", size.params(), " parameters");
    table.Row("1. first sharded get" + of, Of(other, "first get"),
              dsd.first_get);
    table.Row("2. second get, same session" + of, Of(other, "second get"),
              dsd.second_get);
    table.Row("   get after a step" + of, Of(other, "second get"),
              dsd.get_after_step);
    table.Row("3. set" + of, with_set ? Of(other, "set") : Json(), dsd.set);
    table.Row("   bare LibTorch: detach() of each tensor", Json(),
              dsd.bare.get);
    table.Row("   bare LibTorch: copy_() into each", Json(), dsd.bare.set);
    table.Compare("get", Of(other, "digest"), dsd.digest);
    if (with_set) table.Compare("set", Of(other, "set digest"), dsd.set_digest);
    table.CompareOwn("set and get", dsd.digest, dsd.set_digest);
  }
  for (const int times : {1, 4}) {
    if (only == "local") break;
    const Size size{9, (quick ? 8 : 128) * times};
    // The least of them counts, on both sides. PyTorch needs minutes for the
    // larger ones.
    const int runs = times == 1 ? 2 : 1;
    for (const int ranks : {2, 4}) {
      const Gathered dsd = RunGather(ranks, size, runs);
      Json other;
      if (with_peer) {
        other = RunPeer(absl::StrCat(peer, " gather ", ranks, " ", size.layers,
                                     " ", size.experts, " ", runs));
      }
      const std::string of =
          absl::StrCat(", ", size.params(), " tensors, ", ranks, " ranks");
      table.Row("4. gather of the model" + of, Of(other, "gather of the model"),
                dsd.model);
      table.Row("   and of AdamW's state" + of,
                Of(other, "gather of the optimizer"), dsd.optimizer);
      table.Compare("gather", Of(other, "digest"), dsd.digest);
    }
  }
  return table.same() ? 0 : 1;
}

}  // namespace
}  // namespace dsd

int main(int argc, char** argv) {
  const std::string program = dsd::RequestedRankProgram();
  if (!program.empty()) return dsd::RankMain(program);
  dsd::AllowRankProcesses();
  dsd::CommandLine line("Get and set of many small tensors beside PyTorch");
  bool no_peer = false;
  bool no_peer_set = false;
  line.app.add_flag("--no-peer", no_peer, "without PyTorch");
  line.app.add_flag("--no-peer-set", no_peer_set, "without PyTorch's set");
  std::string only;
  line.app.add_option("--only", only, "these rows")
      ->check(CLI::IsMember({"local", "gather"}));
  CLI11_PARSE(line.app, argc, argv);
  return dsd::Run(line.peer(), line.quick, !no_peer, !no_peer_set, only);
}
