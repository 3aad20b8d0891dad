// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/sim/fault.h"

#include "absl/strings/str_cat.h"

namespace dsd::sim {

const char* ToString(FaultKind kind) {
  switch (kind) {
    case FaultKind::kDeath:
      return "death";
    case FaultKind::kPause:
      return "pause";
    case FaultKind::kDelay:
      return "delay";
    case FaultKind::kReorder:
      return "reorder";
    case FaultKind::kDisconnect:
      return "disconnect";
    case FaultKind::kShortTransfer:
      return "short transfer";
    case FaultKind::kCorruptByte:
      return "corrupt byte";
    case FaultKind::kNoSpace:
      return "no space";
    case FaultKind::kIoError:
      return "I/O error";
    case FaultKind::kTornWrite:
      return "torn write";
    case FaultKind::kPowerLoss:
      return "power loss";
  }
  return "?";
}

std::string ToString(const Fault& fault) {
  std::string text =
      absl::StrCat(ToString(fault.kind), " of rank ", fault.rank);
  switch (fault.kind) {
    case FaultKind::kDelay:
    case FaultKind::kDisconnect:
    case FaultKind::kShortTransfer:
    case FaultKind::kCorruptByte:
      absl::StrAppend(&text, " to rank ", fault.peer);
      break;
    default:
      break;
  }
  absl::StrAppend(&text, " at ", fault.at);
  if (fault.length > absl::ZeroDuration()) {
    absl::StrAppend(&text, " for ", absl::FormatDuration(fault.length));
  }
  return absl::StrCat(text, fault.fired > 0 ? " (happened)" : "");
}

}  // namespace dsd::sim
