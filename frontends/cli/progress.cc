// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/progress.h"

#include <algorithm>
#include <ostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/base/env.h"
#include "dsd/frontends/cli/text_table.h"

namespace dsd::cli {
namespace {

constexpr absl::Duration kBefore = absl::Milliseconds(500);
constexpr absl::Duration kBetween = absl::Milliseconds(100);
constexpr int kWidth = 24;

}  // namespace

ProgressBar::ProgressBar(Context& context, absl::string_view label,
                         int64_t total_bytes)
    : context_(context),
      label_(label),
      total_bytes_(total_bytes),
      start_(context.env->Now()),
      next_(start_ + kBefore) {}

ProgressBar::~ProgressBar() { Wipe(); }

void ProgressBar::Add(int64_t bytes) {
  done_bytes_ += bytes;
  if (!context_.terminal.progress) return;
  const absl::Time now = context_.env->Now();
  if (now < next_) return;
  next_ = now + kBetween;
  const double part =
      total_bytes_ > 0
          ? std::min(1.0, static_cast<double>(done_bytes_) / total_bytes_)
          : 1.0;
  const double seconds = absl::ToDoubleSeconds(now - start_);
  const int filled = static_cast<int>(part * kWidth);
  std::string bar;
  for (int i = 0; i < kWidth; ++i) bar += i < filled ? "█" : "░";
  context_.err << "\r\033[K" << label_ << " " << bar
               << absl::StreamFormat(" %3.0f%%  ", part * 100)
               << FormatBytes(done_bytes_) << " of "
               << FormatBytes(total_bytes_) << "  "
               << FormatBytes(static_cast<int64_t>(done_bytes_ / seconds))
               << "/s" << std::flush;
  is_drawn_ = true;
}

void ProgressBar::Show(const Progress& progress) {
  total_bytes_ = progress.bytes_total;
  Add(progress.bytes_done - done_bytes_);
}

void ProgressBar::Wipe() {
  if (is_drawn_) context_.err << "\r\033[K" << std::flush;
  is_drawn_ = false;
}

}  // namespace dsd::cli
