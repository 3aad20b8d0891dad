// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/cli.h"

#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/version.h"
#include "dsd/frontends/cli/near_keys.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

constexpr char kFooter[] =
    "A checkpoint is a directory of torch.distributed.checkpoint or dsd, a "
    "safetensors\nfile or a directory of them, or a file of torch.save. "
    "Nothing in it is executed.\n\n"
    "Exit codes:\n"
    "  0  done; verify: no problems; diff: the same\n"
    "  1  problems in the checkpoint's content, all listed; diff: they differ\n"
    "  2  wrong arguments\n"
    "  3  no checkpoint there, not complete, or it cannot be opened; diff: not "
    "all\n     could be compared\n"
    "  4  the output, or DST of convert, could not be written, or DST is there "
    "already\n"
    "  128 + n  convert was stopped by signal n, 130 by Ctrl-C; DST is as it "
    "was\n";

std::string UnknownCommand(absl::string_view name) {
  std::vector<absl::string_view> names;
  for (const Verb& verb : Verbs()) names.push_back(verb.name);
  const std::string near = DidYouMean(names, name);
  return absl::StrCat("there is no command \"", Printable(name), "\"",
                      near.empty() ? "; dsd --help lists all" : near);
}

}  // namespace

int Run(int argc, const char* const* argv, std::ostream& out, std::ostream& err,
        const Terminal& terminal) {
  Context context{out, err, terminal};
  CLI::App app("Looks into distributed checkpoints.", "dsd");
  app.require_subcommand(1);
  const auto formatter = app.get_formatter();
  formatter->column_width(26);
  for (const auto& [label, text] : {std::make_pair("Positionals", "Arguments"),
                                    std::make_pair("INT:POSITIVE", "N"),
                                    std::make_pair("INT:NONNEGATIVE", "N"),
                                    std::make_pair("SUBCOMMAND", "COMMAND"),
                                    std::make_pair("OPTIONS", "options"),
                                    std::make_pair("REQUIRED", " ")}) {
    formatter->label(label, text);
  }
  app.set_help_flag("-h,--help", "Print this and exit");
  app.set_version_flag("--version", absl::StrCat("dsd ", kLibraryVersion),
                       "Print the version and exit");
  std::vector<std::pair<const CLI::App*, VerbBody>> bodies;
  for (const Verb& verb : Verbs()) {
    CLI::App* const command =
        app.add_subcommand(std::string(verb.name), std::string(verb.summary));
    command->group("Commands");
    bodies.emplace_back(command, verb.declare(*command));
    if (verb.has_json) {
      command->add_flag("--json", context.json, "Print JSON");
    }
    const std::string notes = command->get_footer();
    command->footer(absl::StrCat(notes, notes.empty() ? "" : "\n\n",
                                 "dsd --help has the exit codes."));
  }
  app.footer(kFooter);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& text) {  // of --help or --version
    app.exit(text, out, err);
    return kExitOk;
  } catch (const CLI::ParseError& error) {
    const std::vector<CLI::App*> chosen = app.get_subcommands();
    if (argc < 2) {
      err << app.help();
    } else if (chosen.empty() && argv[1][0] != '-') {
      context.Remark(UnknownCommand(argv[1]));
    } else {
      context.Remark(absl::StrCat(
          Printable(error.what()), "; see dsd ",
          chosen.empty() ? "" : absl::StrCat(chosen[0]->get_name(), " "),
          "--help"));
    }
    return kExitUsage;
  }

  for (const auto& [command, body] : bodies) {
    if (!command->parsed()) continue;
    const absl::StatusOr<ExitCode> code = body(context);
    return code.ok() ? *code : context.Fail(code.status());
  }
  return kExitUsage;
}

}  // namespace dsd::cli
