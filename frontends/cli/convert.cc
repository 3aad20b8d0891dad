// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/convert.h"

#include <signal.h>

#include <atomic>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/float_cast.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/progress.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::ConvertOptions;
using checkpoint::ConvertReport;
using checkpoint::Format;
using checkpoint::FormatName;

// No time is right for all sizes: the longest that there is.
constexpr absl::Duration kTimeout = absl::Hours(24);
constexpr size_t kMaxListed = 16;

constexpr char kNotes[] =
    "SRC and DST: a directory of torch.distributed.checkpoint (dcp), a "
    "safetensors file\nor a directory of them (safetensors), a file of "
    "torch.save (torch). The format of\nSRC is found, that of DST is known "
    "from .safetensors, .pt, .pth, .bin and .ckpt.\n\n"
    "--rename OLD=NEW: OLD is a whole key in which each * stands for any text, "
    "the\nshortest that fits; the * of NEW are the same texts, in order. The "
    "first rule that\nfits a key counts.\n"
    "  'model.*=*'                    strips a prefix\n"
    "  '*=model.*'                    adds one\n"
    "  '*.attn.qkv.*=*.attention.*'   replaces a part\n\n"
    "Nothing is at DST until all of it is.";

// SIGINT and SIGTERM while a conversion is under way, which cleans up then. A
// second one ends the program.
constexpr int kSignals[] = {SIGINT, SIGTERM};

// A handler may touch these only because they have no lock.
std::atomic<bool> interrupted = false;
std::atomic<int> first_signal = 0;
static_assert(std::atomic<bool>::is_always_lock_free);
static_assert(std::atomic<int>::is_always_lock_free);

void OnSignal(int signal) {
  int none = 0;
  first_signal.compare_exchange_strong(none, signal);
  interrupted = true;
}

// Catches them while it lives; one at a time.
class SignalCatcher {
 public:
  SignalCatcher() {
    interrupted = false;
    first_signal = 0;
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      sigaction(kSignals[i], nullptr, &former_[i]);
      // A shell that starts a program in the background may want it so.
      if (former_[i].sa_handler == SIG_IGN) continue;
      struct sigaction action = {};
      action.sa_handler = &OnSignal;
      action.sa_flags = static_cast<int>(SA_RESTART | SA_RESETHAND);
      sigaction(kSignals[i], &action, nullptr);
    }
  }
  ~SignalCatcher() {
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      sigaction(kSignals[i], &former_[i], nullptr);
    }
  }
  SignalCatcher(const SignalCatcher&) = delete;
  SignalCatcher& operator=(const SignalCatcher&) = delete;

 private:
  struct sigaction former_[std::size(kSignals)];
};

struct Arguments {
  std::string source;
  std::string target;
  std::string to;
  std::vector<std::string> rename;
  std::string dtype;
  uint64_t max_file_bytes = 5'000'000'000;
  bool drop_objects = false;
  bool overwrite = false;
  bool no_verify = false;
};

std::string List(const std::vector<std::string>& keys) {
  std::vector<std::string> shown;
  for (size_t i = 0; i < keys.size() && i < kMaxListed; ++i) {
    shown.push_back(Printable(keys[i]));
  }
  return absl::StrCat(
      absl::StrJoin(shown, ", "),
      keys.size() > kMaxListed
          ? absl::StrCat(" and ", FormatCount(keys.size() - kMaxListed),
                         " more")
          : "");
}

absl::StatusOr<ConvertOptions> OptionsOf(const Arguments& arguments) {
  ConvertOptions options;
  options.call.timeout = kTimeout;
  if (!arguments.to.empty()) {
    options.format = checkpoint::ParseFormat(arguments.to);
  } else if (!checkpoint::GuessFormat(arguments.target).has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the name of \"", arguments.target,
                     "\" does not say what to make: "
                     "add --to=dcp, --to=safetensors or --to=torch"));
  }
  for (const std::string& rule : arguments.rename) {
    DSD_RETURN_IF_ERROR(options.rename.Add(rule));
  }
  if (!arguments.dtype.empty()) options.dtype = ParseDType(arguments.dtype);
  options.drop_objects = arguments.drop_objects;
  options.overwrite = arguments.overwrite;
  options.verify = !arguments.no_verify;
  options.max_file_bytes = static_cast<int64_t>(arguments.max_file_bytes);
  return options;
}

// The library's words end where the program has an option.
absl::Status NameOption(const absl::Status& status) {
  const absl::string_view hint =
      absl::IsAlreadyExists(status) ? " (--overwrite)"
      : absl::IsFailedPrecondition(status) &&
              absl::StrContains(status.message(), "allow dropping them")
          ? " (--drop-objects)"
          : "";
  if (hint.empty()) return status;
  absl::Status named(status.code(), absl::StrCat(status.message(), hint));
  status.ForEachPayload(
      [&named](absl::string_view url, const absl::Cord& payload) {
        named.SetPayload(url, payload);
      });
  return named;
}

absl::StatusOr<ExitCode> RunConvert(const Arguments& arguments,
                                    Context& context) {
  DSD_ASSIGN_OR_RETURN(ConvertOptions options, OptionsOf(arguments));
  options.env = context.env;
  options.call.cancel = &interrupted;
  ProgressBar bar(context, "converting");
  options.call.progress = [&](const Progress& progress) { bar.Show(progress); };
  const absl::StatusOr<ConvertReport> report =
      checkpoint::Convert(arguments.source, arguments.target, options);
  bar.Wipe();
  if (absl::IsResourceExhausted(report.status())) {  // of DST: a full disk
    context.Fail(report.status());
    return kExitOutput;
  }
  if (!report.ok()) return NameOption(report.status());
  if (context.json) {
    context.Print({{"source", arguments.source},
                   {"target", arguments.target},
                   {"from", std::string(FormatName(report->from))},
                   {"to", std::string(FormatName(report->to))},
                   {"tensors", report->tensors},
                   {"objects", report->objects},
                   {"bytes", report->payload_bytes},
                   {"file_bytes", report->file_bytes},
                   {"renamed", report->renamed},
                   {"cast", report->cast},
                   {"dropped_objects", report->dropped_objects},
                   {"dropped_attributes", report->dropped_attributes},
                   {"leftovers", report->leftovers}});
    return kExitOk;
  }
  context.out << context.Bold(
                     absl::StrCat("wrote ", Printable(arguments.target), ": ",
                                  Plural(report->tensors, "tensor"), ", ",
                                  FormatBytes(report->payload_bytes)))
              << "; " << Plural(report->objects, "object") << " ("
              << FormatName(report->from) << " to " << FormatName(report->to)
              << ")\n";
  if (report->renamed > 0) {
    context.out << "renamed " << Plural(report->renamed, "key") << "\n";
  }
  if (report->cast > 0) {
    context.out << "cast " << Plural(report->cast, "tensor") << " to "
                << arguments.dtype << "\n";
  }
  if (!report->dropped_objects.empty()) {
    context.out << "dropped "
                << Plural(static_cast<int64_t>(report->dropped_objects.size()),
                          "object")
                << ": " << List(report->dropped_objects) << "\n";
  }
  if (!report->dropped_attributes.empty()) {
    context.out << "left out of __metadata__: "
                << List(report->dropped_attributes) << "\n";
  }
  for (const std::string& file : report->leftovers) {
    context.Remark(absl::StrCat("the old file \"", Printable(file),
                                "\" could not be removed"));
  }
  return kExitOk;
}

}  // namespace

VerbBody DeclareConvert(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  std::vector<std::string> names;
  for (const DType dtype : CastableDTypes()) {
    names.emplace_back(DTypeName(dtype));
  }
  app.add_option("SRC", arguments->source, "The checkpoint")->required();
  app.add_option("DST", arguments->target, "What to make of it")->required();
  app.add_option("--to", arguments->to, "Format of DST")
      ->check(CLI::IsMember({"dcp", "safetensors", "torch"}));
  app.add_option("--rename", arguments->rename, "OLD=NEW; may be repeated")
      ->allow_extra_args(false);
  app.add_option("--dtype", arguments->dtype,
                 "Cast floating-point tensors to it")
      ->check(CLI::IsMember(names));
  app.add_option("--max-shard-size", arguments->max_file_bytes,
                 "Elements in one safetensors file of a directory, such as "
                 "2GB; default 5GB")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->check(AtLeast(1).description(""));
  app.add_flag("--drop-objects", arguments->drop_objects,
               "Leave out objects that DST has no place for");
  app.add_flag("--overwrite", arguments->overwrite, "Replace what is at DST");
  app.add_flag("--no-verify", arguments->no_verify,
               "Do not compare with stored digests");
  app.footer(kNotes);
  return [arguments](Context& context) -> absl::StatusOr<ExitCode> {
    const SignalCatcher catcher;
    const absl::StatusOr<ExitCode> code = RunConvert(*arguments, context);
    if (absl::IsCancelled(code.status())) {
      const int signal = first_signal;
      context.Fail(absl::CancelledError(
          absl::StrCat("stopped by signal ", signal, "; \"",
                       Printable(arguments->target), "\" is as it was")));
      return static_cast<ExitCode>(128 + signal);  // as shells have it
    }
    if (!checkpoint::IsOfTarget(code.status())) return code;
    context.Fail(code.status());
    return kExitOutput;
  };
}

}  // namespace dsd::cli
