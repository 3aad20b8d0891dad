// SPDX-License-Identifier: Apache-2.0
//
// //examples:train_digits that also writes down what its live tensors are, with
// plain file writes and without any of the code that names, moves or saves
// state: what a test compares a checkpoint with.
//
// Environment: DUMP_DIR, a directory; DUMP_STEPS, numbers with commas. After
// each of these steps rank r writes <dir>/step<k>.rank<r>.bin, local tensors
// back to back, and <dir>/step<k>.rank<r>.json, which says where each lies.

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "dsd/examples/train_digits.h"
#include "nlohmann/json.hpp"
#include "torch/nn/module.h"
#include "torch/optim/adamw.h"

namespace {

using Json = nlohmann::json;

class Dump {
 public:
  explicit Dump(const std::string& path)
      : path_(path), file_(path + ".bin", std::ios::binary) {}

  void Add(const std::string& key, const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    const at::Tensor flat = tensor.detach().contiguous();
    tensors_.push_back({{"key", key},
                        {"shape", flat.sizes().vec()},
                        {"dtype", c10::toString(flat.scalar_type())},
                        {"offset", offset_},
                        {"bytes", flat.nbytes()}});
    file_.write(static_cast<const char*>(flat.const_data_ptr()), flat.nbytes());
    offset_ += flat.nbytes();
  }

  absl::Status Finish(Json json) {
    json["tensors"] = std::move(tensors_);
    std::ofstream text(path_ + ".json");
    text << json.dump(1);
    text.close();
    file_.close();
    if (text && file_) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("cannot write ", path_));
  }

 private:
  const std::string path_;
  std::ofstream file_;
  Json tensors_ = Json::array();
  uint64_t offset_ = 0;
};

absl::Status Observe(int64_t step, int rank, torch::nn::Module& model,
                     torch::optim::AdamW& optimizer) {
  const char* const directory = std::getenv("DUMP_DIR");
  const char* const steps = std::getenv("DUMP_STEPS");
  if (directory == nullptr || steps == nullptr) return absl::OkStatus();
  bool wanted = false;
  for (const absl::string_view text : absl::StrSplit(steps, ',')) {
    int64_t number = 0;
    wanted |= absl::SimpleAtoi(text, &number) && number == step;
  }
  if (!wanted) return absl::OkStatus();

  Dump dump(absl::StrCat(directory, "/step", step, ".rank", rank));
  Json counts = Json::object();
  for (const auto& item : model.named_parameters()) {
    const std::string name =
        absl::StrReplaceAll(item.key(), {{"_fsdp_wrapped_module.", ""}});
    const at::Tensor& p = item.value();
    dump.Add("model." + name, p);
    dump.Add("grad." + name, p.grad());
    const auto& state = static_cast<const torch::optim::AdamWParamState&>(
        *optimizer.state().at(p.unsafeGetTensorImpl()));
    dump.Add("optim.state." + name + ".exp_avg", state.exp_avg());
    dump.Add("optim.state." + name + ".exp_avg_sq", state.exp_avg_sq());
    counts[name] = state.step();
  }
  const auto& options = static_cast<const torch::optim::AdamWOptions&>(
      optimizer.param_groups().at(0).options());
  return dump.Finish(
      {{"optimizer_steps", counts},
       {"param_group",
        {{"lr", options.lr()},
         {"betas",
          {std::get<0>(options.betas()), std::get<1>(options.betas())}},
         {"eps", options.eps()},
         {"weight_decay", options.weight_decay()},
         {"amsgrad", options.amsgrad()}}}});
}

}  // namespace

int main(int argc, char** argv) {
  return dsd_examples::TrainDigitsMain(argc, argv, Observe);
}
