// SPDX-License-Identifier: Apache-2.0
//
// The verbs of the program, `dsd ls` and the others, and what they share. A
// verb is a file of its own, a declaration here and a row in verb.cc.

#ifndef DSD_FRONTENDS_CLI_VERB_H_
#define DSD_FRONTENDS_CLI_VERB_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/cli/cli.h"
#include "nlohmann/json.hpp"

namespace CLI {
class App;
class Validator;
}  // namespace CLI

namespace dsd::cli {

using Json = nlohmann::ordered_json;

enum class Colour { kRed = 31, kGreen = 32, kYellow = 33 };

// Where one run of a verb prints to, and how.
struct Context {
  std::ostream& out;  // results
  std::ostream& err;  // errors and remarks, each line begins with "dsd: "
  Terminal terminal;
  bool json = false;  // results are one JSON value
  Env* env = Env::Real();

  // `text` for people, marked where that can be seen.
  std::string Bold(absl::string_view text) const;
  std::string Coloured(absl::string_view text, Colour colour) const;
  void Print(const Json& value);
  // A remark that does not end the run.
  void Remark(absl::string_view text);
  // Tells of an error and returns the exit code: kExitUsage if InvalidArgument,
  // kExitProblems if DataLoss, else kExitUnreadable.
  ExitCode Fail(const absl::Status& error);
};

// Does the work when the arguments are known. The caller calls Fail with an
// error.
using VerbBody = std::function<absl::StatusOr<ExitCode>(Context&)>;

struct Verb {
  absl::string_view name;
  absl::string_view summary;  // one line
  // Declares arguments and options at `app`, which outlives the body; the body
  // finds their values. app.footer(), if set, is text for --help.
  VerbBody (*declare)(CLI::App& app);
  bool has_json = true;  // --json makes sense for it
};

// In the order of --help.
absl::Span<const Verb> Verbs();

VerbBody DeclareCat(CLI::App& app);
VerbBody DeclareCompletion(CLI::App& app);
VerbBody DeclareConvert(CLI::App& app);
VerbBody DeclareDiff(CLI::App& app);
VerbBody DeclareDigest(CLI::App& app);
VerbBody DeclareInfo(CLI::App& app);
VerbBody DeclareLs(CLI::App& app);
VerbBody DeclarePlan(CLI::App& app);
VerbBody DeclarePlot(CLI::App& app);
VerbBody DeclareVerify(CLI::App& app);

// The positional argument of most verbs, required.
void AddCheckpoint(CLI::App& app, std::string* directory,
                   const char* name = "checkpoint");

// For options that are whole numbers of `low` (0 or 1) or more.
CLI::Validator AtLeast(int64_t low);

// Opens what can be opened: without its digests if these are damaged, or do not
// fit the index, which goes to `problem`.
absl::StatusOr<std::shared_ptr<const checkpoint::Checkpoint>> OpenAnyway(
    const std::string& directory, absl::Status* problem);

Json PathJson(const Path& path);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_VERB_H_
