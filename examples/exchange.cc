// SPDX-License-Identifier: Apache-2.0
//
// Weights for programs that know nothing of dsd, and theirs for us: a model is
// saved as a DCP directory, as safetensors and as an archive of torch.save,
// each is read again by its path alone, and sets a second model. Python opens
// what is left behind.
//
//   ./bazelw run //examples:exchange             writes to a temporary folder
//   ./bazelw run //examples:exchange -- FOLDER   or to this one

#include <cstdlib>
#include <iostream>
#include <string>

#include "ATen/core/grad_mode.h"
#include "ATen/ops/equal.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "torch/nn/modules/embedding.h"
#include "torch/nn/modules/linear.h"

namespace {

// A language model in small: `head` is the weight of `words`.
struct NetImpl : torch::nn::Module {
  NetImpl()
      : words(register_module("words", torch::nn::Embedding(100, 16))),
        hidden(register_module("hidden", torch::nn::Linear(16, 16))),
        head(register_parameter("head", words->weight)) {}

  torch::nn::Embedding words;
  torch::nn::Linear hidden;
  at::Tensor head;
};

struct Place {
  const char* name;
  dsd::checkpoint::Format format;
  const char* python;
};

constexpr Place kPlaces[] = {
    {"model", dsd::checkpoint::Format::kDcp,
     "torch.distributed.checkpoint.load"},
    {"model.safetensors", dsd::checkpoint::Format::kSafetensors,
     "safetensors.torch.load_file"},
    {"model.pt", dsd::checkpoint::Format::kTorchArchive, "torch.load"},
};

absl::Status Write(const std::string& path, const Place& place,
                   const dsd::StateDict& state) {
  if (place.format == dsd::checkpoint::Format::kDcp) {
    return dsd::SaveCheckpoint(path, state).status();
  }
  return dsd::ExportCheckpoint(path, place.format, state).status();
}

absl::Status Run(const std::string& folder) {
  NetImpl model;
  DSD_ASSIGN_OR_RETURN(const dsd::StateDict state,
                       dsd::GetModelStateDict(model));
  for (const Place& place : kPlaces) {
    const std::string path = absl::StrCat(folder, "/", place.name);
    DSD_RETURN_IF_ERROR(Write(path, place, state));

    DSD_ASSIGN_OR_RETURN(const dsd::StateDict found, dsd::ReadCheckpoint(path));
    NetImpl other;
    DSD_RETURN_IF_ERROR(dsd::SetModelStateDict(other, found).status());
    DSD_RETURN_IF_ERROR(dsd::TorchToStatus([&]() -> absl::Status {
      if (at::equal(other.words->weight, model.words->weight) &&
          at::equal(other.hidden->bias, model.hidden->bias) &&
          other.head.is_same(other.words->weight)) {
        return absl::OkStatus();
      }
      return absl::InternalError(absl::StrCat(path, " has other values"));
    }));
    std::cout << path << ": the second model equals the first; in Python: "
              << place.python << "\n";
  }
  std::cout << dsd::StateDictText(state);
  return absl::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  std::string folder = argc > 1 ? argv[1] : "/tmp/dsd_exchange_XXXXXX";
  // Under `bazel run` the user's directory is another one than ours.
  const char* const directory = std::getenv("BUILD_WORKING_DIRECTORY");
  if (directory != nullptr && !absl::StartsWith(folder, "/")) {
    folder = absl::StrCat(directory, "/", folder);
  }
  if (argc <= 1 && mkdtemp(folder.data()) == nullptr) {
    std::cerr << "no temporary folder\n";
    return 1;
  }
  const absl::Status status = Run(folder);
  if (status.ok()) return 0;
  std::cerr << status << "\n";
  return 1;
}
