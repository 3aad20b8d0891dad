// SPDX-License-Identifier: Apache-2.0
//
// Writes the checkpoints that docs/cli.md and tests look at:
//
//   example_checkpoint <folder>
//
// <folder>/run1 is a small language model with AdamW's state, saved by 4 ranks
// that shard it (FSDP); <folder>/run2 the same by 2 ranks, with a few values
// changed. <folder>/names has a key that a shell must not execute.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/half.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/test_checkpoint.h"

namespace dsd::cli {
namespace {

struct Parameter {
  std::string name;
  Dims shape;
};

std::vector<Parameter> Parameters() {
  constexpr int64_t kWords = 1024, kWidth = 128;
  std::vector<Parameter> out = {{"embed.weight", {kWords, kWidth}}};
  for (int i = 0; i < 2; ++i) {
    const std::string layer = absl::StrCat("layers.", i, ".");
    out.push_back({layer + "attn.qkv.weight", {3 * kWidth, kWidth}});
    out.push_back({layer + "attn.out.weight", {kWidth, kWidth}});
    out.push_back({layer + "mlp.up.weight", {4 * kWidth, kWidth}});
    out.push_back({layer + "mlp.down.weight", {kWidth, 4 * kWidth}});
    out.push_back({layer + "norm.weight", {kWidth}});
  }
  out.push_back({"norm.weight", {kWidth}});
  return out;
}

// Numbers between -1 and 1 that depend on the key and the position only.
class Numbers {
 public:
  explicit Numbers(const std::string& key) {
    for (const char c : key) state_ = (state_ ^ c) * 0x100000001b3;
  }
  float Next() {
    state_ = state_ * 6364136223846793005 + 1442695040888963407;
    return static_cast<float>(static_cast<int64_t>(state_) >> 40) * 0x1p-23f;
  }

 private:
  uint64_t state_ = 0xcbf29ce484222325;
};

Layout Sharded(const Dims& shape, int ranks) {
  return *Layout::FromPlacements(shape, DeviceMesh::Iota({ranks}), {Shard(0)});
}

TestTensor Weight(const Parameter& parameter, int ranks) {
  const std::string key = "model." + parameter.name;
  const int64_t count = Box::Whole(parameter.shape).num_elements();
  const bool is_norm = absl::StrContains(key, "norm");
  Numbers numbers(key);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) {
    const float number = numbers.Next();
    value = FloatToBFloat16(is_norm ? 1 + number / 100 : number / 11);
  }
  return {key, DType::kBFloat16, Sharded(parameter.shape, ranks),
          BytesOf(values)};
}

TestTensor Moment(const Parameter& parameter, const std::string& name,
                  int ranks) {
  const std::string key =
      absl::StrCat("optim.state.", parameter.name, ".", name);
  const int64_t count = Box::Whole(parameter.shape).num_elements();
  Numbers numbers(key);
  std::vector<float> values(count);
  for (float& value : values) {
    value = numbers.Next() * 1e-3f;
    if (name == "exp_avg_sq") value *= value;
  }
  return {key, DType::kFloat32, Sharded(parameter.shape, ranks),
          BytesOf(values)};
}

absl::Status Write(const std::string& directory, int ranks, bool changed) {
  std::vector<TestTensor> tensors;
  for (const Parameter& parameter : Parameters()) {
    tensors.push_back(Weight(parameter, ranks));
    tensors.push_back(Moment(parameter, "exp_avg", ranks));
    tensors.push_back(Moment(parameter, "exp_avg_sq", ranks));
    if (changed && parameter.name == "layers.1.mlp.up.weight") {
      auto* values =
          reinterpret_cast<uint16_t*>(tensors[tensors.size() - 3].bytes.data());
      for (int i = 0; i < 7; ++i) values[1000 + 500 * i] ^= 1;
    }
  }
  if (changed) tensors.pop_back();
  Object::Dict group;
  group.Set(PathSegment(std::string("lr")), Object(changed ? 0.0002 : 0.0003));
  group.Set(PathSegment(std::string("betas")),
            Object(Object::Tuple{{Object(0.9), Object(0.95)}}));
  group.Set(PathSegment(std::string("weight_decay")), Object(0.1));
  return SaveTo(directory, tensors,
                {{{std::string("step")}, Object(1000)},
                 {{std::string("optim.param_groups.0")}, Object(group)}},
                ranks);
}

}  // namespace
}  // namespace dsd::cli

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: example_checkpoint <folder>\n";
    return 2;
  }
  const std::string folder = argv[1];
  for (const absl::Status& status :
       {dsd::cli::Write(folder + "/run1", 4, false),
        dsd::cli::Write(folder + "/run2", 2, true),
        dsd::cli::SaveTo(
            folder + "/names",
            {dsd::cli::FloatTensor("model.weight", dsd::Dims{2, 3}),
             dsd::cli::FloatTensor("model.bias", dsd::Dims{2}),
             dsd::cli::FloatTensor("$(touch broken)", dsd::Dims{2})},
            {}, 1)}) {
    if (status.ok()) continue;
    std::cerr << status << "\n";
    return 1;
  }
  return 0;
}
