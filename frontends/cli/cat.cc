// SPDX-License-Identifier: Apache-2.0

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/element_stream.h"
#include "dsd/frontends/cli/progress.h"
#include "dsd/frontends/cli/selection.h"
#include "dsd/frontends/cli/statistics.h"
#include "dsd/frontends/cli/tensor_text.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::Checkpoint;
using checkpoint::CheckpointEndpoint;
using Align = TextTable::Align;

constexpr char kNotes[] =
    "A KEY may have a slice, as in Python: 'weight[0:3,:]', 'weight[-1]', "
    "'weight[...,0]'.\nWithout keys, all of them are listed with their "
    "statistics.\n\nmin, max, mean and std are those of the finite numbers; "
    "std is that of the population\n(numpy's, not torch's); of complex "
    "numbers, min and max are magnitudes.";

struct Arguments {
  std::string directory;
  std::vector<std::string> keys;
  std::string match;
  bool statistics = false;  // only
  bool full = false;
};

std::string ShortText(const std::optional<Number>& number) {
  if (!number.has_value()) return "-";
  const auto* real = std::get_if<double>(&*number);
  if (const auto* both = std::get_if<std::complex<double>>(&*number)) {
    return absl::StrFormat("%.6g%+.6gj", both->real(), both->imag());
  }
  return real != nullptr ? absl::StrFormat("%.6g", *real) : NumberText(*number);
}

Json StatisticsJson(const Statistics& s) {
  const auto number = [](const auto& value) {
    return value.has_value() ? NumberJson(Number(*value)) : Json(nullptr);
  };
  return {{"count", s.count},       {"zeros", s.zeros},
          {"nan", s.nan},           {"inf", s.inf},
          {"min", number(s.min)},   {"max", number(s.max)},
          {"mean", number(s.mean)}, {"std", number(s.std)}};
}

// One run of the verb.
class Cat {
 public:
  Cat(const Arguments& arguments, Context& context, const Checkpoint& stored)
      : arguments_(arguments),
        context_(context),
        stored_(stored),
        table_({"KEY", "TYPE", "SHAPE", "MIN", "MAX", "MEAN", "STD", "ZEROS",
                "NAN", "INF"},
               {Align::kLeft, Align::kLeft, Align::kLeft, Align::kRight,
                Align::kRight, Align::kRight, Align::kRight, Align::kRight,
                Align::kRight, Align::kRight}),
        in_table_(arguments.statistics || arguments.keys.empty()) {}

  absl::StatusOr<ExitCode> Run();

 private:
  // A problem of one key; the others are still looked at.
  void Problem(const absl::Status& status) {
    context_.Remark(status.message());
    exit_code_ = kExitProblems;
  }

  // Of numbers that nobody wants.
  std::string Alarming(int64_t count) const {
    const std::string text = FormatCount(count);
    return count > 0 ? context_.Coloured(text, Colour::kRed) : text;
  }

  absl::Status AddTensor(CheckpointEndpoint& endpoint, size_t tensor,
                         const Slice& slice, const std::string& name,
                         ProgressBar& progress);
  absl::Status PrintTensor(size_t tensor, const Slice& slice,
                           const std::string& name,
                           const Statistics& statistics, bool complete);
  void AddObject(size_t index);

  const Arguments& arguments_;
  Context& context_;
  const Checkpoint& stored_;
  TextTable table_;
  const bool in_table_;
  Json entries_ = Json::array();
  int64_t printed_ = 0;
  ExitCode exit_code_ = kExitOk;
};

absl::Status Cat::AddTensor(CheckpointEndpoint& endpoint, size_t tensor,
                            const Slice& slice, const std::string& name,
                            ProgressBar& progress) {
  const TensorSpec& spec = endpoint.catalog()[tensor];
  const int64_t count = slice.box.num_elements();
  StatisticsBuilder builder(spec.dtype);
  DSD_ASSIGN_OR_RETURN(
      const int64_t found,
      ReadStored(endpoint, tensor, slice.box, [&](const Piece& piece) {
        builder.Add(piece.elements);
        progress.Add(static_cast<int64_t>(piece.elements.size()));
        return absl::OkStatus();
      }));
  if (found != count) {
    Problem(absl::DataLossError(
        absl::StrCat("\"", Printable(name), "\": ", count - found, " of ",
                     Plural(count, "element"), " are in no shard")));
  }
  const Statistics s = builder.Finish();
  if (in_table_ && !context_.json) {
    table_.AddRow({Printable(name), std::string(DTypeName(spec.dtype)),
                   DimsToString(slice.shape()), ShortText(s.min),
                   ShortText(s.max), ShortText(s.mean), ShortText(s.std),
                   FormatCount(s.zeros), Alarming(s.nan), Alarming(s.inf)});
    return absl::OkStatus();
  }
  progress.Wipe();
  return PrintTensor(*stored_.catalog().Find(spec.fqn), slice, name, s,
                     found == count);
}

absl::Status Cat::PrintTensor(size_t tensor, const Slice& slice,
                              const std::string& name, const Statistics& s,
                              bool complete) {
  const TensorSpec& spec = stored_.catalog()[tensor];
  const Dims shape = slice.shape();
  const int64_t count = slice.box.num_elements();
  const int64_t bytes = count * ItemSize(spec.dtype);
  // One of its own: what is read twice must not be verified.
  const std::vector<std::string> keys = {spec.fqn};
  DSD_ASSIGN_OR_RETURN(const auto endpoint, stored_.MakeEndpoint(keys));
  if (context_.json) {
    Json entry = {{"key", spec.fqn},
                  {"dtype", std::string(DTypeName(spec.dtype))},
                  {"shape", std::vector<int64_t>(shape.begin(), shape.end())},
                  {"bytes", bytes},
                  {"statistics", StatisticsJson(s)}};
    if (name != spec.fqn) entry["slice"] = name.substr(spec.fqn.size());
    if (!in_table_ && complete &&
        (arguments_.full || count <= kPrintThreshold)) {
      DSD_ASSIGN_OR_RETURN(entry["values"], TensorJson(*endpoint, 0, slice));
    }
    entries_.push_back(std::move(entry));
    return absl::OkStatus();
  }
  std::ostream& out = context_.out;
  if (printed_++ > 0) out << "\n";
  out << context_.Bold(Printable(name)) << "  " << DTypeName(spec.dtype) << " "
      << DimsToString(shape) << ", " << FormatBytes(bytes) << " in "
      << Plural(
             static_cast<int64_t>(StoredBoxes(spec.layout, slice.box).size()),
             "shard")
      << "\n";
  out << "min " << ShortText(s.min) << ", max " << ShortText(s.max) << ", mean "
      << ShortText(s.mean) << ", std " << ShortText(s.std) << "; "
      << Plural(s.zeros, "zero") << ", " << Alarming(s.nan) << " NaN, "
      << Alarming(s.inf) << " Inf\n";
  if (!complete) return absl::OkStatus();
  return WriteTensor(*endpoint, 0, slice, arguments_.full, out);
}

void Cat::AddObject(size_t index) {
  const std::string& key = stored_.objects()[index].key;
  const absl::StatusOr<Object> value = stored_.ReadObject(index);
  if (!value.ok()) return Problem(value.status());
  if (context_.json) {
    entries_.push_back({{"key", key},
                        {"type", std::string(value->kind_name())},
                        {"value", ValueJson(*value)}});
    return;
  }
  if (printed_++ > 0) context_.out << "\n";
  context_.out << context_.Bold(Printable(key)) << "  "
               << Printable(value->kind_name()) << "\n"
               << ValueText(*value, std::string::npos) << "\n";
}

absl::StatusOr<ExitCode> Cat::Run() {
  std::vector<Selection> chosen;
  for (const std::string& key : arguments_.keys) {
    DSD_ASSIGN_OR_RETURN(Selection selection, ParseSelection(key, stored_));
    chosen.push_back(std::move(selection));
  }
  std::vector<std::string> names = arguments_.keys;
  if (names.empty()) {
    for (size_t i = 0; i < stored_.catalog().size(); ++i) {
      const TensorSpec& spec = stored_.catalog()[i];
      if (!absl::StrContains(spec.fqn, arguments_.match)) continue;
      chosen.push_back({spec.fqn, true, i, Slice::Whole(spec.shape())});
      names.push_back(spec.fqn);
    }
  }
  int64_t total_bytes = 0;
  for (const Selection& selection : chosen) {
    if (!selection.is_tensor) continue;
    total_bytes += selection.slice.box.num_elements() *
                   ItemSize(stored_.catalog()[selection.index].dtype);
  }
  ProgressBar progress(context_, "reading", total_bytes);
  std::unique_ptr<CheckpointEndpoint> endpoint;
  if (arguments_.keys.empty()) {
    DSD_ASSIGN_OR_RETURN(endpoint, stored_.MakeEndpoint(names));
  }
  for (size_t i = 0; i < chosen.size(); ++i) {
    const Selection& selection = chosen[i];
    if (!selection.is_tensor) {
      progress.Wipe();
      AddObject(selection.index);
      continue;
    }
    absl::Status status;
    if (arguments_.keys.empty()) {
      status = AddTensor(*endpoint, i, selection.slice, names[i], progress);
    } else {
      // Keys may be named twice, and each endpoint verifies what it reads once.
      const std::vector<std::string> key = {selection.key};
      DSD_ASSIGN_OR_RETURN(endpoint, stored_.MakeEndpoint(key));
      status = AddTensor(*endpoint, 0, selection.slice, names[i], progress);
      if (status.ok()) status = endpoint->Verify().status();
    }
    if (absl::IsInvalidArgument(status)) return status;
    if (!status.ok()) Problem(status);
  }
  if (arguments_.keys.empty()) {
    const absl::Status verified = endpoint->Verify().status();
    if (!verified.ok()) Problem(verified);
  }
  progress.Wipe();
  if (context_.json) {
    context_.Print(
        {{"path", stored_.path()}, {"entries", std::move(entries_)}});
  } else if (in_table_ && !chosen.empty()) {
    context_.out << table_.ToString(context_.terminal.styled);
  }
  return exit_code_;
}

}  // namespace

VerbBody DeclareCat(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  AddCheckpoint(app, &arguments->directory);
  app.add_option("key", arguments->keys, "Keys, perhaps with a slice")
      ->option_text(" ");
  app.add_flag("--stats", arguments->statistics, "Only statistics, as a table");
  app.add_flag("--full", arguments->full, "All values, however many there are");
  app.add_option("--match", arguments->match,
                 "Without keys: only those that contain this text");
  app.footer(kNotes);
  return [arguments](Context& context) -> absl::StatusOr<ExitCode> {
    absl::Status problem;
    DSD_ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> stored,
                         OpenAnyway(arguments->directory, &problem));
    DSD_ASSIGN_OR_RETURN(const ExitCode code,
                         Cat(*arguments, context, *stored).Run());
    if (problem.ok()) return code;
    context.Remark(problem.message());
    return kExitProblems;
  };
}

}  // namespace dsd::cli
