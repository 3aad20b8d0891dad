// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/verb.h"

#include <variant>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "dsd/frontends/cli/value_text.h"

namespace dsd::cli {

using checkpoint::Checkpoint;

absl::Span<const Verb> Verbs() {
  static constexpr Verb kVerbs[] = {
      {"ls", "List keys: type, shape, size, shards, value", &DeclareLs},
      {"info", "Summarize: totals, types, files, largest tensors",
       &DeclareInfo},
      {"cat", "Show values and statistics of tensors, and objects",
       &DeclareCat},
      {"diff", "Compare two checkpoints, whatever their layouts", &DeclareDiff},
      {"verify", "Check every byte: archives, CRCs, pickles, index, digests",
       &DeclareVerify},
      {"digest", "Digest each key's content, whatever files it lies in",
       &DeclareDigest},
      {"convert", "Make a checkpoint of another format, names or dtype",
       &DeclareConvert},
      {"plan", "Explain what a reshard would move between which ranks",
       &DeclarePlan},
      {"plot", "Draw who holds which part of which tensor", &DeclarePlot},
      {"completion", "Print the completion script of a shell",
       &DeclareCompletion, false},
  };
  return kVerbs;
}

std::string Context::Bold(absl::string_view text) const {
  return terminal.styled ? absl::StrCat("\033[1m", text, "\033[0m")
                         : std::string(text);
}

std::string Context::Coloured(absl::string_view text, Colour colour) const {
  return terminal.styled ? absl::StrCat("\033[", static_cast<int>(colour), "m",
                                        text, "\033[0m")
                         : std::string(text);
}

void Context::Print(const Json& value) {
  out << value.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
}

void Context::Remark(absl::string_view text) { err << "dsd: " << text << "\n"; }

ExitCode Context::Fail(const absl::Status& error) {
  Remark(error.message());
  if (json) {
    Print({{"error", std::string(error.message())},
           {"code", absl::StatusCodeToString(error.code())}});
  }
  if (absl::IsInvalidArgument(error)) return kExitUsage;
  return absl::IsDataLoss(error) ? kExitProblems : kExitUnreadable;
}

void AddCheckpoint(CLI::App& app, std::string* directory, const char* name) {
  app.add_option(name, *directory, "The checkpoint's directory or file")
      ->option_text(" ")
      ->required();
}

CLI::Validator AtLeast(int64_t low) {
  // The names are those of CLI11's own, which --help shows as N.
  return CLI::Validator(
      [low](std::string& text) {
        int64_t value = 0;
        if (absl::SimpleAtoi(text, &value) && value >= low) {
          return std::string();
        }
        return absl::StrCat("is \"", Printable(text),
                            "\", expected a number of ", low, " or more");
      },
      low > 0 ? "POSITIVE" : "NONNEGATIVE");
}

absl::StatusOr<std::shared_ptr<const Checkpoint>> OpenAnyway(
    const std::string& directory, absl::Status* problem) {
  checkpoint::OpenOptions options;
  auto opened = Checkpoint::Open(directory, options);
  if (!absl::IsDataLoss(opened.status())) return opened;
  *problem = opened.status();
  options.verify = false;
  return Checkpoint::Open(directory, options);
}

Json PathJson(const Path& path) {
  Json out = Json::array();
  for (const PathSegment& segment : path) {
    std::visit([&out](const auto& v) { out.push_back(v); }, segment);
  }
  return out;
}

}  // namespace dsd::cli
