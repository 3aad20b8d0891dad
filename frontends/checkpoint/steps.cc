// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/steps.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/data_file_writer.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/live_state.h"
#include "dsd/frontends/checkpoint/record_codec.h"
#include "dsd/frontends/checkpoint/step_files.h"

namespace dsd::checkpoint {
namespace {

constexpr absl::string_view kLatest = "latest";

// "/runs/7/step-" -> "/runs/7", "step-".
StepName SplitSeries(const std::string& series) {
  StepName out;
  const size_t slash = series.rfind('/');
  if (slash == std::string::npos) {
    out.root = ".";
    out.prefix = series;
  } else {
    out.root = slash == 0 ? "/" : series.substr(0, slash);
    out.prefix = series.substr(slash + 1);
  }
  return out;
}

std::optional<int64_t> NumberIn(absl::string_view name,
                                absl::string_view prefix) {
  int64_t number;
  if (!absl::ConsumePrefix(&name, prefix) || name.empty() ||
      name.find_first_not_of("0123456789") != absl::string_view::npos ||
      !absl::SimpleAtoi(name, &number)) {
    return std::nullopt;
  }
  return number;
}

struct Found {
  int64_t number;
  std::string name;
  bool committed;
};

// All directories of the series, by number.
absl::StatusOr<std::vector<Found>> Find(const StepName& series,
                                        FileSystem& files) {
  std::vector<Found> out;
  const absl::StatusOr<std::vector<std::string>> names =
      files.List(series.root);
  if (absl::IsNotFound(names.status())) return out;
  DSD_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    const std::optional<int64_t> number = NumberIn(name, series.prefix);
    if (!number.has_value()) continue;
    const std::string directory = JoinFile(series.root, name);
    const absl::StatusOr<FileInfo> info = files.Stat(directory);
    if (!info.ok() || info->kind != FileKind::kDirectory) continue;
    bool committed = false;
    // The second is one of Python's without collectives.
    for (const char* const index : {kIndexFile, kFirstRankIndexFile}) {
      const absl::Status status =
          files.Stat(JoinFile(directory, index)).status();
      if (!status.ok() && !absl::IsNotFound(status)) return status;
      committed |= status.ok();
    }
    out.push_back({*number, name, committed});
  }
  std::stable_sort(out.begin(), out.end(), [](const Found& a, const Found& b) {
    return a.number < b.number;
  });
  return out;
}

// Whether the index decodes and all files are there at their lengths.
absl::Status CheckWhole(const std::string& directory, Env* env) {
  OpenOptions options;
  options.env = env;
  DSD_ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> checkpoint,
                       Checkpoint::Open(directory, options));
  const Checkpoint::Impl& impl = CheckpointInternals::Get(*checkpoint);
  std::vector<int64_t> ends(impl.index.files.size());
  const auto count = [&ends](const dcp::ItemLocation& at) {
    ends[at.file] = std::max(ends[at.file], at.offset_bytes + at.length_bytes);
  };
  for (const dcp::ItemLocation& at : impl.index.locations) count(at);
  for (const auto& object : impl.index.objects) count(object.location);
  for (size_t i = 0; i < ends.size(); ++i) {
    const std::string path = JoinFile(directory, impl.index.files[i]);
    // Of what is read: the name may be a link.
    DSD_ASSIGN_OR_RETURN(const std::unique_ptr<ReadableFile> file,
                         env->files().OpenReadable(path));
    if (file->size_bytes() < ends[i]) {
      return absl::DataLossError(absl::StrCat("\"", path, "\" has ",
                                              file->size_bytes(),
                                              " bytes, expected ", ends[i]));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<LatestStep> FindHere(const std::string& series, Env* env) {
  DSD_ASSIGN_OR_RETURN(const std::vector<Step> steps, ListSteps(series, env));
  LatestStep out;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    absl::Status whole = CheckWhole(step->directory, env);
    if (whole.ok()) {
      out.step = *step;
      return out;
    }
    out.skipped.emplace_back(*step, std::move(whole));
  }
  std::string why;
  for (const auto& [step, status] : out.skipped) {
    absl::StrAppend(&why, "; ", step.directory, ": ", status.message());
  }
  return absl::NotFoundError(
      absl::StrCat("no whole checkpoint \"", series, "<number>\"", why));
}

}  // namespace

absl::StatusOr<StepName> ParseStep(const std::string& directory) {
  const absl::string_view trimmed = absl::StripSuffix(directory, "/");
  const size_t end = trimmed.find_last_not_of("0123456789");
  const size_t digits = end == absl::string_view::npos ? 0 : end + 1;
  StepName out = SplitSeries(std::string(trimmed.substr(0, digits)));
  if (!absl::SimpleAtoi(trimmed.substr(digits), &out.number)) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", directory,
                     "\" is to be one of a series, and its name does not "
                     "end in a number"));
  }
  out.name = absl::StrCat(out.prefix, trimmed.substr(digits));
  return out;
}

absl::Status PointToLatest(const StepName& step, absl::string_view file_id,
                           FileSystem& files) {
  const std::string latest =
      JoinFile(step.root, absl::StrCat(step.prefix, kLatest));
  const std::string temporary = absl::StrCat(latest, "_", file_id, ".tmp");
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                       files.CreateWritable(temporary));
  const std::string text = absl::StrCat(step.name, "\n");
  absl::Status status = file->WriteAt(
      0, absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()),
                             text.size()));
  if (status.ok()) status = file->Sync();
  if (status.ok()) status = file->Close();
  if (status.ok()) status = files.Rename(temporary, latest);
  if (!status.ok()) {
    files.Remove(temporary).IgnoreError();
    return status;
  }
  return files.SyncDir(step.root);
}

absl::StatusOr<std::vector<std::string>> PruneOlder(const StepName& newest,
                                                    const Retention& retention,
                                                    FileSystem& files) {
  std::vector<std::string> gone;
  if (retention.keep_last <= 0) return gone;
  DSD_ASSIGN_OR_RETURN(const std::vector<Found> found, Find(newest, files));
  int64_t newer = 0;  // committed ones
  for (auto step = found.rbegin(); step != found.rend(); ++step) {
    if (step->number > newest.number) continue;  // of another run, or later
    const bool kept =
        step->number == newest.number ||
        (step->committed && (newer < retention.keep_last ||
                             (retention.keep_every > 0 &&
                              step->number % retention.keep_every == 0)));
    newer += step->committed;
    if (kept) continue;
    const std::string directory = JoinFile(newest.root, step->name);
    DSD_ASSIGN_OR_RETURN(std::vector<std::string> names, files.List(directory));
    for (std::string& name : names) {
      if (name != kIndexFile && !RankOfIndex(name).has_value()) continue;
      DSD_RETURN_IF_ERROR(files.Remove(JoinFile(directory, name)));
      name.clear();
    }
    if (step->committed) DSD_RETURN_IF_ERROR(files.SyncDir(directory));
    bool empty = true;
    for (const std::string& name : names) {
      if (name.empty()) continue;  // removed above
      if (!IsCheckpointFile(name)) {
        empty = false;
        continue;
      }
      DSD_RETURN_IF_ERROR(files.Remove(JoinFile(directory, name)));
    }
    if (empty) DSD_RETURN_IF_ERROR(files.Remove(directory));
    gone.push_back(directory);
  }
  DSD_ASSIGN_OR_RETURN(const std::vector<std::string> names,
                       files.List(newest.root));
  const std::string temporary = absl::StrCat(newest.prefix, kLatest, "_");
  for (const std::string& name : names) {
    if (absl::StartsWith(name, temporary) && absl::EndsWith(name, ".tmp")) {
      DSD_RETURN_IF_ERROR(files.Remove(JoinFile(newest.root, name)));
    }
  }
  DSD_RETURN_IF_ERROR(files.SyncDir(newest.root));
  return gone;
}

absl::StatusOr<std::vector<Step>> ListSteps(const std::string& series,
                                            Env* env) {
  const StepName split = SplitSeries(series);
  DSD_ASSIGN_OR_RETURN(const std::vector<Found> found,
                       Find(split, env->files()));
  std::vector<Step> steps;
  for (const Found& step : found) {
    if (!step.committed) continue;
    steps.push_back({step.number, JoinFile(split.root, step.name)});
  }
  return steps;
}

absl::StatusOr<LatestStep> FindLatest(const std::string& series,
                                      Communicator* comm,
                                      const CallOptions& options, Env* env) {
  env = ChooseEnv(env, comm);
  if (comm == nullptr || comm->size() == 1) return FindHere(series, env);
  absl::StatusOr<LatestStep> found = LatestStep();
  RecordWriter out;
  if (comm->rank() == 0) {
    found = FindHere(series, env);
    out.Number(static_cast<int64_t>(found.status().code()));
    out.Text(found.status().message());
    out.Number(found.ok() ? found->step.number : 0);
    out.Text(found.ok() ? found->step.directory : "");
  }
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> records,
      comm->AllGatherBlobs(out.Take(), kMaxRecordBytes, options));
  if (comm->rank() == 0) return found;
  RecordReader in(records[0]);
  const int64_t code = in.Number();
  const absl::string_view message = in.Text();
  found->step.number = in.Number();
  found->step.directory = std::string(in.Text());
  DSD_RETURN_IF_ERROR(in.status());
  if (code != 0) {
    return absl::Status(static_cast<absl::StatusCode>(code), message);
  }
  return found;
}

absl::StatusOr<std::vector<std::string>> Prune(const std::string& series,
                                               const Retention& retention,
                                               Env* env) {
  DSD_ASSIGN_OR_RETURN(const std::vector<Step> steps, ListSteps(series, env));
  if (steps.empty()) return std::vector<std::string>();
  const absl::Status whole = CheckWhole(steps.back().directory, env);
  if (!whole.ok()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "nothing was removed: the newest checkpoint, \"",
        steps.back().directory, "\", is not whole: ", whole.message()));
  }
  DSD_ASSIGN_OR_RETURN(const StepName newest,
                       ParseStep(steps.back().directory));
  return PruneOlder(newest, retention, env->files());
}

}  // namespace dsd::checkpoint
