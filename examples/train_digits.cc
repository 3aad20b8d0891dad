// SPDX-License-Identifier: Apache-2.0
//
// Trains a small classifier of handwritten digits, sharded over ranks, saves in
// the middle of it, starts again on another number of ranks from that
// checkpoint and proves that nothing was lost. See kDescription.

#include "dsd/examples/train_digits.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "ATen/Parallel.h"
#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/launch.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/examples/digits_data.h"
#include "dsd/examples/spawn_ranks.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/cli/cli.h"
#include "dsd/frontends/parallel/fully_shard.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "nlohmann/json.hpp"
#include "tools/cpp/runfiles/runfiles.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"

namespace dsd_examples {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr char kDescription[] =
    "Trains a classifier of handwritten digits with sharded parameters and "
    "AdamW state,\nsaves in the middle, starts again from the checkpoint on "
    "another number of ranks,\nand proves that the state is the same bit for "
    "bit and that the loss goes on as before.";

constexpr char kFooter[] =
    "Without a launcher the program starts its ranks on this machine. Under "
    "one "
    "it is a rank\nof that world: it trains, saves in the middle and goes on "
    "to "
    "the last step; with --resume\nit starts from a checkpoint, on any number "
    "of ranks:\n\n"
    "  torchrun --nproc-per-node=4 --no-python train_digits --out /shared/run\n"
    "  torchrun --nproc-per-node=2 --no-python train_digits --out /shared/run "
    "--resume /shared/run/checkpoint\n"
    "  srun -n 4 train_digits --out /shared/run\n"
    "  mpirun -n 4 train_digits --out /shared/run\n\n"
    "If the file train.json of the run that saved lies beside the checkpoint, "
    "a "
    "resumed run\ncompares itself with it and fails if they differ.\n"
    "Exit codes: 0, or 1 with the error of each rank on standard error, or 2 "
    "for wrong arguments\nor a wrong environment of the launcher.";
constexpr int kExitUsage = 2;

constexpr int64_t kBatchSize = 100;
constexpr double kLearningRate = 3e-3;
// Ranks sum gradients in another order when their number changes; the
// difference in the loss grows from the last bit on.
constexpr double kLossTolerance = 1e-4;

struct Options {
  int ranks = 4;
  int resume_ranks = 2;
  int64_t steps = 150;
  int64_t save_step = 0;  // 0: half of steps
  std::vector<int64_t> hidden = {130, 66};
  uint64_t seed = 1;
  std::string out;
  std::string resume;
  std::string backend;
  std::string data;
  double timeout_seconds = 120;
  bool summary = true;  // of the checkpoint, at the end of the run that saves
  bool has_output = true;  // see OpenStandardStreams

  int64_t SaveStep() const {
    return save_step > 0 ? save_step : std::max<int64_t>(steps / 2, 1);
  }
  std::string CheckpointDir() const {
    return (fs::path(out) / "checkpoint").string();
  }
  absl::Duration Timeout() const { return absl::Seconds(timeout_seconds); }
};

// fc1, fc2, ..., each a unit of its own, and a parameter of one element that
// belongs to the root: rank 0 has it, the others have empty shards.
struct ClassifierImpl : torch::nn::Module {
  ClassifierImpl(const std::vector<int64_t>& hidden,
                 const std::shared_ptr<dsd::FullyShardContext>& context)
      : logit_scale(register_parameter("logit_scale", at::ones({1}))) {
    std::vector<int64_t> widths = {kPixels};
    widths.insert(widths.end(), hidden.begin(), hidden.end());
    widths.push_back(kClasses);
    for (size_t i = 1; i < widths.size(); ++i) {
      layers.push_back(register_module(
          absl::StrCat("fc", i),
          dsd::MakeFullyShard(torch::nn::Linear(widths[i - 1], widths[i]),
                              context)));
    }
  }

  at::Tensor forward(at::Tensor x) {
    for (size_t i = 0; i < layers.size(); ++i) {
      x = layers[i]->forward(i == 0 ? x : at::gelu(x));
    }
    return x * logit_scale;
  }

  std::vector<std::shared_ptr<dsd::FullyShard<torch::nn::LinearImpl>>> layers;
  at::Tensor logit_scale;
};

// A standard stream that is closed would become some file or connection that is
// opened next, and output, or what LibTorch has to say, would go there. Returns
// whether there was an output.
bool OpenStandardStreams() {
  bool has_output = true;
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(stream, F_GETFD) >= 0) continue;
    has_output &= stream != STDOUT_FILENO;
    // Takes the lowest number that is free.
    const int fd = open("/dev/null", O_RDWR);
    if (fd >= 0 && fd != stream) close(fd);
  }
  return has_output;
}

absl::Status ClosedOutput() {
  return absl::UnavailableError(
      "standard output is closed, expected a place for the report; send it to "
      "/dev/null if it does not matter");
}

// Whether standard output is a terminal that can go back in a line.
bool IsTerminal() {
  const char* const term = std::getenv("TERM");
  return isatty(STDOUT_FILENO) != 0 && term != nullptr &&
         absl::string_view(term) != "dumb";
}

// One line that is drawn again and again on a terminal; elsewhere lines that
// stay, ten in all.
class ProgressLine {
 public:
  explicit ProgressLine(int64_t total) : total_(total) {}

  void Show(int64_t step, double loss, std::optional<double> accuracy) {
    if (accuracy.has_value()) {
      accuracy_ = accuracy;
    } else if (!redraws_ || absl::Now() < next_) {
      return;
    }
    next_ = absl::Now() + absl::Milliseconds(50);
    const std::string total = absl::StrCat(total_);
    std::string text = absl::StrFormat("step %*d/%s  loss %.4f", total.size(),
                                       step, total, loss);
    if (accuracy_.has_value()) {
      absl::StrAppendFormat(&text, "  held-out accuracy %.1f %%",
                            100 * *accuracy_);
    }
    // A line that does not fit could not be drawn over.
    const int64_t columns = redraws_ ? Columns() - 1 : 80;
    const int64_t text_columns = static_cast<int64_t>(text.size());
    const int64_t width = std::min<int64_t>(24, columns - text_columns - 5);
    if (width >= 4) {
      const int64_t filled = width * step / total_;
      text = absl::StrCat("  [", std::string(filled, '='),
                          std::string(width - filled, ' '), "] ", text);
    }
    text.resize(std::min<size_t>(text.size(), columns));
    std::cout << (redraws_ ? "\r" : "") << text << (redraws_ ? "\x1b[K" : "\n")
              << std::flush;
    open_ = redraws_;
  }

  // Before other output.
  void Break() {
    if (std::exchange(open_, false)) std::cout << "\n";
  }

 private:
  static int64_t Columns() {
    winsize size = {};
    const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0;
    return known && size.ws_col > 0 ? size.ws_col : 80;
  }

  const int64_t total_;
  const bool redraws_ = IsTerminal();
  absl::Time next_ = absl::InfinitePast();
  std::optional<double> accuracy_;
  bool open_ = false;
};

dsd::Digest128 ParseDigest(const Json& json) {
  dsd::Digest128 digest;
  if (!dsd::ParseDigestHex(json.get<std::string>(), &digest)) {
    throw std::invalid_argument("a digest that is none");
  }
  return digest;
}

// What the run that saves leaves beside the checkpoint for runs that resume.
struct Record {
  std::string save_id;
  int64_t save_step = 0;
  int world_size = 0;
  uint64_t seed = 0;
  std::vector<double> losses;  // of step 1, 2, ...
  // Of the live state when it was saved.
  dsd::checkpoint::CheckpointDigests digests;

  static std::string PathFor(const std::string& checkpoint_dir) {
    return (fs::path(checkpoint_dir).lexically_normal() / "../train.json")
        .lexically_normal()
        .string();
  }

  absl::Status Write(const std::string& path) const {
    Json keys = Json::object();
    for (const auto& [key, digest] : digests.keys)
      keys[key] = DigestHex(digest);
    const Json json = {{"save_id", save_id},
                       {"save_step", save_step},
                       {"ranks", world_size},
                       {"seed", seed},
                       {"digest", DigestHex(digests.whole)},
                       {"digests", keys},
                       {"losses", losses}};
    const std::string text = absl::StrCat(json.dump(1), "\n");
    // The old one or the new one, whole.
    const std::string temporary = path + ".tmp";
    dsd::FileSystem& files = dsd::Env::Real()->files();
    files.Remove(temporary).IgnoreError();  // of a run that was killed
    const auto write = [&]() -> absl::Status {
      DSD_ASSIGN_OR_RETURN(const std::unique_ptr<dsd::WritableFile> file,
                           files.CreateWritable(temporary));
      DSD_RETURN_IF_ERROR(file->WriteAt(
          0,
          absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()),
                              text.size())));
      DSD_RETURN_IF_ERROR(file->Close());
      return files.Rename(temporary, path);
    };
    const absl::Status status = write();
    if (!status.ok()) files.Remove(temporary).IgnoreError();
    return status;
  }

  // nullopt if there is no such file.
  static absl::StatusOr<std::optional<Record>> Read(const std::string& path) {
    std::ifstream file(path);
    if (!file) return std::nullopt;
    const Json json = Json::parse(file, nullptr, /*allow_exceptions=*/false);
    Record record;
    try {
      json.at("save_id").get_to(record.save_id);
      json.at("save_step").get_to(record.save_step);
      json.at("ranks").get_to(record.world_size);
      json.at("seed").get_to(record.seed);
      json.at("losses").get_to(record.losses);
      record.digests.whole = ParseDigest(json.at("digest"));
      for (const auto& [key, digest] : json.at("digests").items()) {
        record.digests.keys.push_back({key, ParseDigest(digest)});
      }
    } catch (const std::exception& e) {
      return absl::DataLossError(
          absl::StrCat(path, " is not the record of a run: ", e.what()));
    }
    return record;
  }
};

absl::Status CompareDigests(const dsd::checkpoint::CheckpointDigests& saved,
                            const dsd::checkpoint::CheckpointDigests& loaded) {
  std::vector<std::string> differing;
  size_t i = 0;
  for (const auto& [key, digest] : saved.keys) {
    while (i < loaded.keys.size() && loaded.keys[i].key < key) {
      differing.push_back(loaded.keys[i++].key);
    }
    const bool found = i < loaded.keys.size() && loaded.keys[i].key == key;
    if (!found || loaded.keys[i].digest != digest) differing.push_back(key);
    if (found) ++i;
  }
  for (; i < loaded.keys.size(); ++i) differing.push_back(loaded.keys[i].key);
  if (differing.empty() && saved.whole == loaded.whole) {
    return absl::OkStatus();
  }
  return absl::DataLossError(absl::StrCat(
      "the state after the load is not the state at the save; differing: ",
      absl::StrJoin(differing, ", ")));
}

// Text in quotes as Python reads it.
std::string PythonString(const std::string& text) {
  return absl::StrCat(
      "\"", absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"\"", "\\\""}}), "\"");
}

// Where the checkpoint is, what is in it, and how Python opens it.
absl::Status PrintSummary(const std::string& checkpoint_dir) {
  const std::string directory = fs::absolute(checkpoint_dir).string();
  std::ostringstream table, error;
  const char* const arguments[] = {"dsd", "ls", "--", directory.c_str()};
  if (dsd::cli::Run(4, arguments, table, error, {IsTerminal()}) != 0) {
    return absl::DataLossError(error.str());
  }
  std::cout << "\nThe checkpoint is in " << directory << "\n\n"
            << table.str() << "\nOpen it in Python:\n\n"
            << "    import torch, torch.distributed.checkpoint as dcp\n"
            << "    path = " << PythonString(directory) << "\n"
            << "    index = dcp.FileSystemReader(path).read_metadata()\n"
            << "    state = {key: torch.empty(item.size, "
               "dtype=item.properties.dtype)\n"
            << "             for key, item in "
               "index.state_dict_metadata.items() if hasattr(item, \"size\")}\n"
            << "    dcp.load(state, checkpoint_id=path)\n"
            << "    print(state[\"model.fc1.weight\"])\n\n"
            << std::flush;
  return absl::OkStatus();
}

// One rank of a run.
class Job {
 public:
  Job(const Options& options, dsd::Communicator* comm,
      const StepObserver& observer)
      : options_(options),
        comm_(comm),
        observer_(observer),
        context_(std::make_shared<dsd::FullyShardContext>(
            comm, dsd::FullyShardOptions())),
        progress_(options.steps) {}

  // The error, if any, is that of all ranks, unless the group is broken.
  absl::Status Run();

 private:
  bool IsRoot() const { return comm_->rank() == 0; }
  // "4 ranks over gloo".
  std::string RanksAndBackend() const {
    return comm_->backend().empty()
               ? Ranks()
               : absl::StrCat(Ranks(), " over ", comm_->backend());
  }
  std::string Ranks() const {
    return absl::StrCat(comm_->size(), comm_->size() == 1 ? " rank" : " ranks");
  }
  absl::Status BuildModel(uint64_t seed);
  absl::StatusOr<double> Step(int64_t step);
  absl::StatusOr<double> HeldOutAccuracy();
  absl::StatusOr<dsd::StateDict> State(int64_t step);
  absl::Status Save(int64_t step);
  absl::StatusOr<int64_t> Load();
  absl::Status CompareDigestsWithRecord(
      const std::string& save_id,
      const dsd::checkpoint::CheckpointDigests& digests);
  absl::Status CompareLosses(int64_t first_step);
  absl::Status Finish(int64_t first_step);
  absl::StatusOr<int64_t> CountZeroMoments();

  // Makes an error of one rank that of all.
  absl::Status Together(const absl::Status& local) {
    return dsd::Agree(comm_, "train_digits", dsd::Digest(), local,
                      [] { return std::string(); });
  }

  // Runs a part of the training, in which ranks wait for each other: they hear
  // at once of an error of this one.
  template <class Body>
  absl::Status Compute(Body body) {
    const absl::Status status = dsd::TorchToStatus(body);
    if (!status.ok()) comm_->Abort(status);
    return status;
  }

  // The sum over all ranks.
  template <class T>
  absl::StatusOr<T> Sum(T mine, dsd::DType dtype) {
    DSD_RETURN_IF_ERROR(comm_->AllReduce(
        absl::MakeSpan(reinterpret_cast<std::byte*>(&mine), sizeof(mine)),
        dtype, dsd::ReduceOp::kSum));
    return mine;
  }

  const Options& options_;
  dsd::Communicator* const comm_;
  const StepObserver& observer_;
  const std::shared_ptr<dsd::FullyShardContext> context_;
  ProgressLine progress_;
  Digits digits_;
  std::shared_ptr<dsd::FullyShard<ClassifierImpl>> model_;
  std::unique_ptr<torch::optim::AdamW> optimizer_;
  Record record_;                    // of this run
  std::optional<Record> first_run_;  // of the run that saved
};

absl::Status Job::BuildModel(uint64_t seed) {
  return dsd::TorchToStatus([&] {
    // All ranks build equal whole layers; FullyShard keeps this rank's rows.
    at::manual_seed(seed);
    model_ = dsd::MakeFullyShard(
        std::make_shared<ClassifierImpl>(options_.hidden, context_), context_);
    optimizer_ = std::make_unique<torch::optim::AdamW>(
        model_->parameters(), torch::optim::AdamWOptions(kLearningRate));
  });
}

// Trains on this rank's part of the batch. Returns the mean loss of the batch
// before the step.
absl::StatusOr<double> Job::Step(int64_t step) {
  double loss_sum = 0;
  DSD_RETURN_IF_ERROR(Compute([&] {
    const Examples batch =
        digits_.train
            .Select(BatchIndices(digits_.train.size(), kBatchSize,
                                 options_.seed, step))
            .Part(comm_->rank(), comm_->size());
    optimizer_->zero_grad();
    const at::Tensor sum =
        at::cross_entropy_loss(model_->forward(batch.pixels), batch.labels,
                               /*weight=*/{}, at::Reduction::Sum);
    // FullyShard takes the mean over ranks: together the mean over the batch,
    // also where parts are not equal.
    (sum * (static_cast<double>(comm_->size()) / kBatchSize)).backward();
    optimizer_->step();
    loss_sum = sum.item<double>();
  }));
  DSD_ASSIGN_OR_RETURN(loss_sum, Sum(loss_sum, dsd::DType::kFloat64));
  return loss_sum / kBatchSize;
}

absl::StatusOr<double> Job::HeldOutAccuracy() {
  int64_t correct = 0;
  DSD_RETURN_IF_ERROR(Compute([&] {
    at::NoGradGuard no_grad;
    const Examples part = digits_.held_out.Part(comm_->rank(), comm_->size());
    correct = model_->forward(part.pixels)
                  .argmax(1)
                  .eq(part.labels)
                  .sum()
                  .item<int64_t>();
  }));
  DSD_ASSIGN_OR_RETURN(correct, Sum(correct, dsd::DType::kInt64));
  return static_cast<double>(correct) / kHeldOut;
}

// The state of the job. Its tensors are the live ones.
absl::StatusOr<dsd::StateDict> Job::State(int64_t step) {
  DSD_ASSIGN_OR_RETURN(dsd::ModelAndOptimizerStateDict got,
                       dsd::GetStateDict(*model_, *optimizer_, comm_));
  dsd::StateDict state;
  state.Set("model", std::move(got.model));
  state.Set("optim", std::move(got.optimizer));
  state.Set("step", step);
  return state;
}

absl::StatusOr<int64_t> Job::CountZeroMoments() {
  int64_t zeros = 0;
  DSD_RETURN_IF_ERROR(Together(dsd::TorchToStatus([&] {
    for (const auto& [parameter, state] : optimizer_->state()) {
      const auto& adamw =
          static_cast<const torch::optim::AdamWParamState&>(*state);
      for (const at::Tensor& moment : {adamw.exp_avg(), adamw.exp_avg_sq()}) {
        zeros += moment.eq(0).sum().item<int64_t>();
      }
    }
  })));
  return Sum(zeros, dsd::DType::kInt64);
}

absl::Status Job::Save(int64_t step) {
  DSD_ASSIGN_OR_RETURN(const dsd::StateDict state, State(step));
  DSD_ASSIGN_OR_RETURN(record_.digests, dsd::ComputeDigests(state, comm_));
  DSD_ASSIGN_OR_RETURN(const int64_t zeros, CountZeroMoments());
  const std::string directory = options_.CheckpointDir();
  DSD_ASSIGN_OR_RETURN(const dsd::checkpoint::SaveReport report,
                       dsd::SaveCheckpoint(directory, state, comm_));
  record_.save_id = report.save_id;
  record_.save_step = step;
  if (!IsRoot()) return absl::OkStatus();
  progress_.Break();
  std::cout << "Saved step " << step << " from " << Ranks() << " to "
            << directory << ":\n  " << report.payload_bytes_all << " bytes in "
            << report.tensors << " tensors, cut into " << report.chunks
            << " shards; " << report.objects
            << " objects\n  digest of the live state "
            << DigestHex(record_.digests.whole) << "; " << zeros
            << " elements of the optimizer's moments are zero\n"
            << std::flush;
  return absl::OkStatus();
}

// Returns the step of the checkpoint.
absl::StatusOr<int64_t> Job::Load() {
  DSD_ASSIGN_OR_RETURN(dsd::StateDict state, State(0));
  DSD_ASSIGN_OR_RETURN(const dsd::checkpoint::LoadReport report,
                       dsd::LoadCheckpoint(options_.resume, &state, comm_));
  const auto& model = *state.Find("model")->get_if<dsd::StateDict>();
  const auto& optimizer = *state.Find("optim")->get_if<dsd::StateDict>();
  DSD_RETURN_IF_ERROR(
      dsd::SetStateDict(*model_, *optimizer_, model, optimizer, comm_));
  const auto* const step = state.Find("step")->get_if<int64_t>();
  if (step == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("\"step\" in ", options_.resume, " is of kind ",
                     state.Find("step")->kind_name(), ", expected int"));
  }
  if (*step >= options_.steps) {
    return absl::FailedPreconditionError(
        absl::StrCat(options_.resume, " has done step ", *step, " of --steps ",
                     options_.steps, "; ask for more steps"));
  }

  // From what is live now, not from what was read.
  DSD_ASSIGN_OR_RETURN(const dsd::StateDict live, State(*step));
  DSD_ASSIGN_OR_RETURN(const dsd::checkpoint::CheckpointDigests digests,
                       dsd::ComputeDigests(live, comm_));
  const auto checkpoint = dsd::checkpoint::Checkpoint::Open(options_.resume);
  DSD_RETURN_IF_ERROR(Together(checkpoint.status()));
  int64_t stored_bytes = 0;
  for (const dsd::TensorSpec& spec : (*checkpoint)->catalog().tensors()) {
    stored_bytes +=
        spec.layout.whole().num_elements() * dsd::ItemSize(spec.dtype);
  }
  if (report.payload_bytes_all != stored_bytes) {
    return absl::InternalError(
        absl::StrCat("ranks read ", report.payload_bytes_all, " bytes of ",
                     options_.resume, ", which stores ", stored_bytes));
  }
  if (IsRoot()) {
    std::cout << "Loaded step " << *step << " on " << Ranks() << " from "
              << options_.resume << ":\n  " << report.payload_bytes_all
              << " bytes read by all ranks, " << stored_bytes
              << " stored: each once\n";
  }

  DSD_RETURN_IF_ERROR(
      Together(CompareDigestsWithRecord(report.save_id, digests)));
  return *step;
}

absl::Status Job::CompareDigestsWithRecord(
    const std::string& save_id,
    const dsd::checkpoint::CheckpointDigests& digests) {
  const std::string path = Record::PathFor(options_.resume);
  DSD_ASSIGN_OR_RETURN(first_run_, Record::Read(path));
  if (first_run_.has_value() && first_run_->save_id != save_id) {
    first_run_.reset();
  }
  if (!first_run_.has_value()) {
    if (IsRoot()) {
      std::cout << "  no record of the run that saved it in " << path
                << ": nothing to compare with\n"
                << std::flush;
    }
    return absl::OkStatus();
  }
  DSD_RETURN_IF_ERROR(CompareDigests(first_run_->digests, digests));
  if (IsRoot()) {
    std::cout << "  digest of the live state " << DigestHex(digests.whole)
              << ", as at the save: equal bit for bit\n"
              << std::flush;
  }
  return absl::OkStatus();
}

absl::Status Job::CompareLosses(int64_t first_step) {
  if (first_run_->seed != options_.seed) {
    std::cout << "The run that saved had --seed " << first_run_->seed
              << ": losses are not compared\n";
    return absl::OkStatus();
  }
  const bool same_ranks = first_run_->world_size == comm_->size();
  const double tolerance = same_ranks ? 0 : kLossTolerance;
  const size_t last =
      std::min(first_run_->losses.size(), record_.losses.size());
  if (last < static_cast<size_t>(first_step)) {
    std::cout << "The first run ended at step " << last
              << ": no losses to compare\n";
    return absl::OkStatus();
  }
  double worst = 0;
  for (size_t i = first_step - 1; i < last; ++i) {
    const double difference =
        std::abs(record_.losses[i] - first_run_->losses[i]);
    // Also true for a NaN.
    if (!(difference <= worst)) worst = difference;
  }
  const std::string text = absl::StrFormat(
      "losses of steps %d to %d on %s differ by %.2g at most from those of the "
      "first run on %d",
      first_step, last, Ranks(), worst, first_run_->world_size);
  if (!(worst <= tolerance)) {
    return absl::DataLossError(
        absl::StrFormat("%s, expected %g at most", text, tolerance));
  }
  std::cout << "Continued: " << text
            << (same_ranks ? " (equal bit for bit)\n"
                           : absl::StrFormat(" (allowed %g)\n", tolerance));
  return absl::OkStatus();
}

absl::Status Job::Run() {
  at::set_num_threads(1);  // ranks share the cores
  const bool resuming = !options_.resume.empty();
  const auto prepare = [&]() -> absl::Status {
    if (IsRoot() && !options_.has_output) return ClosedOutput();
    DSD_ASSIGN_OR_RETURN(digits_, LoadDigits(options_.data));
    // A run that resumes begins with other values, which the load must replace.
    DSD_RETURN_IF_ERROR(BuildModel(options_.seed + (resuming ? 1 : 0)));
    // Better now than after half of the training.
    if (resuming) return absl::OkStatus();
    return dsd::Env::Real()->files().CreateDirs(options_.out);
  };
  DSD_RETURN_IF_ERROR(Together(prepare()));
  record_.world_size = comm_->size();
  record_.seed = options_.seed;
  if (IsRoot()) {
    int64_t mine = 0;
    for (const at::Tensor& p : model_->parameters()) mine += p.numel();
    std::cout << (resuming ? "Resuming" : "Training") << " on "
              << RanksAndBackend() << ": " << digits_.train.size()
              << " digits, " << kHeldOut << " held out; rank 0 holds " << mine
              << " parameters\n"
              << std::flush;
  }

  int64_t done = 0;
  if (resuming) {
    DSD_ASSIGN_OR_RETURN(done, Load());
    if (first_run_.has_value()) {
      record_.losses.assign(
          first_run_->losses.begin(),
          first_run_->losses.begin() +
              std::min<size_t>(done, first_run_->losses.size()));
    }
    record_.losses.resize(done);
  }
  const int64_t first_step = done + 1;
  const int64_t report_every = std::max<int64_t>(options_.steps / 10, 1);
  for (int64_t step = first_step; step <= options_.steps; ++step) {
    DSD_ASSIGN_OR_RETURN(const double loss, Step(step));
    record_.losses.push_back(loss);
    if (observer_) {
      DSD_RETURN_IF_ERROR(
          Together(observer_(step, comm_->rank(), *model_, *optimizer_)));
    }
    std::optional<double> accuracy;
    if (step % report_every == 0 || step == options_.steps) {
      DSD_ASSIGN_OR_RETURN(accuracy, HeldOutAccuracy());
    }
    if (IsRoot()) progress_.Show(step, loss, accuracy);
    if (!resuming && step == options_.SaveStep()) {
      DSD_RETURN_IF_ERROR(Save(step));
    }
  }
  return Together(IsRoot() ? Finish(first_step) : absl::OkStatus());
}

absl::Status Job::Finish(int64_t first_step) {
  progress_.Break();
  const bool resuming = !options_.resume.empty();
  if (first_run_.has_value()) return CompareLosses(first_step);
  if (resuming) return absl::OkStatus();
  DSD_RETURN_IF_ERROR(record_.Write(Record::PathFor(options_.CheckpointDir())));
  return options_.summary ? PrintSummary(options_.CheckpointDir())
                          : absl::OkStatus();
}

// This process is a rank.
absl::Status RunRank(const Options& options, const dsd::LaunchInfo& launch,
                     const StepObserver& observer) {
  dsd::WorldOptions world;
  world.backend = options.backend;
  world.connect_timeout = options.Timeout();
  DSD_ASSIGN_OR_RETURN(const std::unique_ptr<dsd::Communicator> comm,
                       dsd::ConnectWorld(launch, world));
  const absl::Status status = Job(options, comm.get(), observer).Run();
  dsd::CallOptions call;
  call.timeout = options.Timeout();
  const absl::Status left = comm->Shutdown(call);
  return status.ok() ? left : status;
}

std::vector<std::string> RankArguments(const Options& options,
                                       const std::string& resume) {
  std::vector<std::string> arguments = {
      "--steps",     absl::StrCat(options.steps),
      "--save-step", absl::StrCat(options.SaveStep()),
      "--hidden",    absl::StrJoin(options.hidden, ","),
      "--seed",      absl::StrCat(options.seed),
      "--out",       options.out,
      "--data",      options.data,
      "--timeout",   absl::StrCat(options.timeout_seconds),
      "--no-summary"};
  if (!options.backend.empty()) {
    arguments.insert(arguments.end(), {"--backend", options.backend});
  }
  if (!resume.empty()) {
    arguments.insert(arguments.end(), {"--resume", resume});
  }
  return arguments;
}

// This process starts ranks.
absl::Status RunAll(const Options& options) {
  if (!options.has_output) return ClosedOutput();
  DSD_RETURN_IF_ERROR(dsd::FindBackend(options.backend));
  if (!options.resume.empty()) {
    return RunRanks(options.resume_ranks,
                    RankArguments(options, options.resume));
  }
  DSD_RETURN_IF_ERROR(RunRanks(options.ranks, RankArguments(options, "")))
      << "first run";
  DSD_RETURN_IF_ERROR(RunRanks(options.resume_ranks,
                               RankArguments(options, options.CheckpointDir())))
      << "run that resumes";
  return PrintSummary(options.CheckpointDir());
}

// Under `bazel run` the user's directory is another one than ours.
std::string UserPath(const std::string& path) {
  const char* const directory = std::getenv("BUILD_WORKING_DIRECTORY");
  fs::path absolute = path;
  if (absolute.is_relative() && directory != nullptr) {
    absolute = fs::path(directory) / absolute;
  }
  return absolute.lexically_normal().string();
}

// What at::manual_seed takes.
CLI::Validator Seed() {
  return CLI::Validator(
      [](std::string& text) {
        uint64_t seed;
        if (absl::SimpleAtoi(text, &seed)) return std::string();
        return absl::StrCat("is \"", text, "\", expected a number from 0 to ",
                            std::numeric_limits<uint64_t>::max());
      },
      "");
}

// Numbers from `low` to `high`.
CLI::Validator Between(double low, double high) {
  return CLI::Validator(
      [low, high](std::string& text) {
        double number;
        if (absl::SimpleAtod(text, &number) && number >= low &&
            number <= high) {
          return std::string();
        }
        return absl::StrFormat("is \"%s\", expected a number from %g to %.7g",
                               text, low, high);
      },
      "");
}

std::string DefaultOut() {
  std::error_code error;
  fs::path parent = fs::temp_directory_path(error);
  if (error) parent = "/tmp";
  return (parent / absl::StrCat("train_digits-", getuid())).string();
}

// Errors are the user's, in what was on the command line or in the environment.
absl::Status CheckArguments(const Options& options, const CLI::App& app,
                            const dsd::LaunchInfo& launch) {
  if (options.SaveStep() > options.steps) {
    return absl::InvalidArgumentError(
        absl::StrCat("--save-step is ", options.save_step,
                     ", expected at most --steps, which is ", options.steps));
  }
  if (options.out.empty()) {
    return absl::InvalidArgumentError("--out is empty, expected a folder");
  }
  if (app.count("--resume") > 0 && options.resume.empty()) {
    return absl::InvalidArgumentError("--resume is empty, expected a folder");
  }
  if (app.count("--backend") > 0) {
    DSD_RETURN_IF_ERROR(dsd::FindBackend(options.backend));
  }
  if (launch.launcher == "none") {
    if (options.resume.empty() && options.SaveStep() == options.steps) {
      return absl::InvalidArgumentError(
          absl::StrCat("--save-step is ", options.save_step,
                       ", expected less than --steps, which is ", options.steps,
                       ": the run that resumes goes on from there"));
    }
    return absl::OkStatus();
  }
  if (app.count("--ranks") > 0 || app.count("--resume-ranks") > 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--ranks and --resume-ranks are for runs without a launcher; this is "
        "rank ",
        launch.rank, " of ", launch.world_size, " of ", launch.launcher));
  }
  if (launch.world_size > kBatchSize) {
    return absl::InvalidArgumentError(absl::StrCat(
        "world of ", launch.world_size, " ranks, expected at most ", kBatchSize,
        ", the examples in a batch"));
  }
  return absl::OkStatus();
}

absl::Status Run(Options options, const dsd::LaunchInfo& launch,
                 const StepObserver& observer) {
  options.out = UserPath(options.out);
  if (!options.resume.empty()) options.resume = UserPath(options.resume);
  if (options.data.empty()) {
    std::string error;
    const std::unique_ptr<bazel::tools::cpp::runfiles::Runfiles> runfiles(
        bazel::tools::cpp::runfiles::Runfiles::Create(
            fs::read_symlink("/proc/self/exe").string(), &error));
    if (runfiles != nullptr) {
      options.data = runfiles->Rlocation("digits/digits.csv");
    }
  } else {
    options.data = UserPath(options.data);
  }
  if (launch.launcher == "none") return RunAll(options);
  return dsd::Annotate(
      RunRank(options, launch, observer),
      absl::StrCat("rank ", launch.rank, " of ", launch.world_size));
}

// Whether all that was said has arrived.
absl::Status FlushOutput() {
  if (std::cout.flush()) return absl::OkStatus();
  return absl::UnavailableError("the output could not be written");
}

// Tells of an error and returns the exit code: arguments and the environment
// are the user's, all else is a run that failed. In one write, so that ranks do
// not mix their lines.
int Fail(const absl::Status& status) {
  std::cerr << absl::StrCat(
                   "train_digits: ", absl::StatusCodeToString(status.code()),
                   ": ", status.message(), "\n")
            << std::flush;
  return absl::IsInvalidArgument(status) ? kExitUsage : EXIT_FAILURE;
}

}  // namespace

int TrainDigitsMain(int argc, char** argv, const StepObserver& observer) {
  Options options;
  options.has_output = OpenStandardStreams();
  options.out = DefaultOut();
  CLI::App app(kDescription, "train_digits");
  app.footer(kFooter);
  app.get_formatter()->column_width(24);
  app.add_option("--ranks", options.ranks, "Ranks of the first run, 1 to 64.")
      ->check(Between(1, 64))
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--resume-ranks", options.resume_ranks,
                 "Ranks of the run that starts from the checkpoint.")
      ->check(Between(1, 64))
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--steps", options.steps,
                 absl::StrCat("Training steps in all, of ", kBatchSize,
                              " digits each."))
      ->check(Between(2, 1e6))
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--save-step", options.save_step,
                 "Step after which to save. Default: half of --steps.")
      ->check(Between(1, 1e6))
      ->type_name("N");
  app.add_option("--out", options.out,
                 "Where to put the checkpoint (in the folder \"checkpoint\") "
                 "and the\nrecord of the run (train.json). All ranks must see "
                 "it.")
      ->type_name("DIR")
      ->capture_default_str();
  app.add_option("--resume", options.resume,
                 "Only start from this checkpoint, on --resume-ranks ranks, "
                 "and go\non to the last step.")
      ->type_name("DIR");
  app.add_option("--backend", options.backend,
                 absl::StrCat("What moves bytes between ranks. Linked: ",
                              absl::StrJoin(dsd::LinkedBackends(), ", "),
                              ".\nDefault: the build's."))
      ->type_name("NAME");
  app.add_option("--hidden", options.hidden,
                 "Widths of the hidden layers. Default: 130,66.")
      ->delimiter(',')
      ->check(Between(1, 65536))
      ->type_name("N,N,");
  app.add_option("--seed", options.seed,
                 "For initial values and the order of the digits.")
      ->check(Seed())
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--data", options.data,
                 "The digits as CSV. Default: those that Bazel fetched.")
      ->type_name("FILE");
  app.add_option("--timeout", options.timeout_seconds,
                 "Seconds to wait for all ranks to arrive.")
      ->check(Between(0.001, 86400))
      ->type_name("N")
      ->capture_default_str();
  // For the ranks that this program starts itself.
  app.add_flag("!--no-summary", options.summary)->group("");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (app.exit(error) != 0) return kExitUsage;
    const absl::Status status =
        options.has_output ? FlushOutput() : ClosedOutput();
    return status.ok() ? EXIT_SUCCESS : Fail(status);
  }
  const absl::StatusOr<dsd::LaunchInfo> launch =
      dsd::LaunchFromEnvironment(dsd::ProcessEnvironment());
  absl::Status status =
      launch.ok() ? CheckArguments(options, app, *launch) : launch.status();
  if (!status.ok()) {
    Fail(status);
    return kExitUsage;  // whatever its code
  }
  status = Run(std::move(options), *launch, observer);
  if (status.ok()) status = FlushOutput();
  return status.ok() ? EXIT_SUCCESS : Fail(status);
}

}  // namespace dsd_examples
