// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/cli.h"

#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

constexpr char kFooter[] =
    "A checkpoint is a directory that torch.distributed.checkpoint or dsd "
    "wrote. "
    "Nothing\nin it is executed.\n\n"
    "Exit codes:\n"
    "  0  done; verify: no problems; diff: the same\n"
    "  1  problems in the checkpoint's content, all listed; diff: they differ\n"
    "  2  wrong arguments\n"
    "  3  no checkpoint there, not complete, or it cannot be opened; diff: "
    "not\n"
    "     all could be compared\n"
    "  4  the output could not be written\n";

// "ls, verify or digest".
std::string VerbNames() {
  std::vector<absl::string_view> names;
  for (const Verb& verb : Verbs()) names.push_back(verb.name);
  const absl::string_view last = names.back();
  names.pop_back();
  return absl::StrCat(absl::StrJoin(names, ", "), " or ", last);
}

}  // namespace

int Run(int argc, const char* const* argv, std::ostream& out, std::ostream& err,
        const Terminal& terminal) {
  Context context{out, err, terminal};
  CLI::App app("Looks into distributed checkpoints.", "dsd");
  app.require_subcommand(1);
  app.get_formatter()->column_width(28);
  std::vector<std::pair<const CLI::App*, VerbBody>> bodies;
  for (const Verb& verb : Verbs()) {
    CLI::App* const command =
        app.add_subcommand(std::string(verb.name), std::string(verb.summary));
    bodies.emplace_back(command, verb.declare(*command));
    command->add_flag("--json", context.json, "Print JSON");
    const std::string notes = command->get_footer();
    command->footer(absl::StrCat(notes, notes.empty() ? "" : "\n\n", kFooter));
  }
  app.footer(kFooter);
  try {
    app.parse(argc, argv);
  } catch (const CLI::RequiredError& error) {
    if (argc > 1 && app.get_subcommands().empty()) {
      context.Remark(absl::StrCat("there is no command \"", Printable(argv[1]),
                                  "\", expected ", VerbNames()));
      return kExitUsage;
    }
    app.exit(error, out, err);
    return kExitUsage;
  } catch (const CLI::ParseError& error) {
    return app.exit(error, out, err) == 0 ? kExitOk : kExitUsage;
  }

  for (const auto& [command, body] : bodies) {
    if (!command->parsed()) continue;
    const absl::StatusOr<ExitCode> code = body(context);
    return code.ok() ? *code : context.Fail(code.status());
  }
  return kExitUsage;
}

}  // namespace dsd::cli
