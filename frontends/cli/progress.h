// SPDX-License-Identifier: Apache-2.0
//
// A line that says how far a long verb is, for terminals only.

#ifndef DSD_FRONTENDS_CLI_PROGRESS_H_
#define DSD_FRONTENDS_CLI_PROGRESS_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "dsd/core/base/call_options.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {

// Draws on the error stream if terminal.progress, once half a second has
// passed, and wipes the line when it is destroyed. Thread-compatible.
class ProgressBar {
 public:
  // `label` says what is being done: "comparing". Borrows `context`. Without a
  // total, Show gives it.
  ProgressBar(Context& context, absl::string_view label,
              int64_t total_bytes = 0);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void Add(int64_t bytes);
  void Show(const Progress& progress);

  // Wipes the line, so that something else can be printed.
  void Wipe();

 private:
  Context& context_;
  const std::string label_;
  int64_t total_bytes_;
  const absl::Time start_;
  absl::Time next_;
  int64_t done_bytes_ = 0;
  bool is_drawn_ = false;
};

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_PROGRESS_H_
