// SPDX-License-Identifier: Apache-2.0

#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/progress.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::Checkpoint;
using checkpoint::CheckpointDigests;
using checkpoint::KeyDigest;

absl::StatusOr<ExitCode> PrintDigests(const std::string& directory,
                                      Context& context) {
  DSD_ASSIGN_OR_RETURN(const auto stored, Checkpoint::Open(directory));
  ProgressBar bar(context, "reading");
  const absl::StatusOr<CheckpointDigests> digests = checkpoint::ComputeDigests(
      *stored, [&](const Progress& progress) { bar.Show(progress); });
  bar.Wipe();
  if (!digests.ok()) {
    context.Fail(digests.status());
    return kExitProblems;
  }
  if (context.json) {
    Json keys = Json::object();
    for (const KeyDigest& key : digests->keys) {
      keys[key.key] = DigestHex(key.digest);
    }
    context.Print({{"path", directory},
                   {"whole", DigestHex(digests->whole)},
                   {"keys", std::move(keys)}});
    return kExitOk;
  }
  for (const KeyDigest& key : digests->keys) {
    context.out << DigestHex(key.digest) << "  " << Printable(key.key) << "\n";
  }
  context.out << context.Bold(DigestHex(digests->whole)) << "  (all of it)\n";
  return kExitOk;
}

}  // namespace

VerbBody DeclareDigest(CLI::App& app) {
  auto directory = std::make_shared<std::string>();
  AddCheckpoint(app, directory.get());
  return [directory](Context& context) {
    return PrintDigests(*directory, context);
  };
}

}  // namespace dsd::cli
