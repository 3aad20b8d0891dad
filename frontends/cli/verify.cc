// SPDX-License-Identifier: Apache-2.0

#include <memory>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/frontends/cli/progress.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::Problem;
using checkpoint::VerifyReport;

// Of each format, all that there is to check, but for digests.
absl::string_view WhatIsChecked(checkpoint::Format format) {
  switch (format) {
    case checkpoint::Format::kDcp:
      return "archives, CRCs, index";
    case checkpoint::Format::kSafetensors:
      return "headers";
    case checkpoint::Format::kTorchArchive:
      return "archive, CRCs, pickle";
  }
  return "";
}

absl::StatusOr<ExitCode> Verify(const std::string& directory,
                                Context& context) {
  ExitCode exit_code = kExitOk;
  std::vector<Problem> problems;
  absl::Status problem;
  const auto opened = OpenAnyway(directory, &problem);
  if (!problem.ok()) problems.push_back({"", "", problem});
  VerifyReport report;
  bool has_digests = false;
  if (opened.ok()) {
    ProgressBar bar(context, "verifying");
    report = checkpoint::Verify(
        **opened, [&](const Progress& progress) { bar.Show(progress); });
    has_digests = (*opened)->has_digests();
  } else if (problems.empty()) {
    return opened.status();
  }
  problems.insert(problems.end(), report.problems.begin(),
                  report.problems.end());
  if (!problems.empty()) exit_code = kExitProblems;

  if (context.json) {
    Json list = Json::array();
    for (const Problem& problem : problems) {
      list.push_back({{"key", problem.key},
                      {"file", problem.file},
                      {"code", absl::StatusCodeToString(problem.status.code())},
                      {"text", std::string(problem.status.message())}});
    }
    context.Print({{"path", directory},
                   {"ok", problems.empty()},
                   {"tensors", report.tensors},
                   {"objects", report.objects},
                   {"chunks", report.chunks},
                   {"bytes_read", report.bytes},
                   {"digests_compared", report.compared},
                   {"problems", std::move(list)},
                   {"unreferenced_files", report.unreferenced}});
    return exit_code;
  }
  for (const Problem& problem : problems) {
    const std::string text(problem.status.message());
    context.out << context.Coloured("problem", Colour::kRed);
    // Most texts say where; the others are short.
    if (!problem.key.empty() &&
        !absl::StrContains(text, absl::CHexEscape(problem.key))) {
      context.out << " \"" << Printable(problem.key) << "\"";
    }
    if (!problem.file.empty() &&
        !absl::StrContains(text, absl::CHexEscape(problem.file))) {
      context.out << " in " << Printable(problem.file);
    }
    context.out << ": " << text << "\n";
  }
  for (const std::string& file : report.unreferenced) {
    context.out << "note: " << file
                << " is of no use to this checkpoint and can be removed\n";
  }
  if (opened.ok()) {
    context.out << "checked " << Plural(report.tensors, "tensor") << " in "
                << Plural(report.chunks, "shard") << ", "
                << Plural(report.objects, "object") << ", "
                << FormatBytes(report.bytes) << ": "
                << WhatIsChecked((*opened)->format())
                << (has_digests ? absl::StrCat(", ", Plural(report.compared,
                                                            "content digest"))
                                : std::string(" (it has no content digests)"))
                << "\n";
  }
  context.out << context.Bold(problems.empty() ? "no problems"
                                               : Plural(static_cast<int64_t>(
                                                            problems.size()),
                                                        "problem"))
              << "\n";
  return exit_code;
}

}  // namespace

VerbBody DeclareVerify(CLI::App& app) {
  auto directory = std::make_shared<std::string>();
  AddCheckpoint(app, directory.get());
  return [directory](Context& context) { return Verify(*directory, context); };
}

}  // namespace dsd::cli
