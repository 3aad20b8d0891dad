// SPDX-License-Identifier: Apache-2.0
//
// What goes wrong in a simulation, and where.

#ifndef DSD_BACKENDS_SIM_FAULT_H_
#define DSD_BACKENDS_SIM_FAULT_H_

#include <array>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace dsd::sim {

enum class FaultKind {
  kDeath,          // the rank stops for good at its place number `at`
  kPause,          // it stands still there for `length`
  kDelay,          // message `at` of the link comes later by `length`
  kReorder,        // messages of all links come later by up to `length`
  kDisconnect,     // the link breaks before its message `at`
  kShortTransfer,  // ... in the middle of it: the front has arrived
  kCorruptByte,    // message `at` of the link arrives with another byte
  kNoSpace,        // the disk is full from file operation `at` of the rank on
  kIoError,        // file operation `at` of the rank fails
  kTornWrite,      // the rank dies in its write `at`, the front of which counts
  kPowerLoss,      // all ranks die in file operation `at` of the rank; what was
                   // not synced is lost or kept, in parts
};
inline constexpr int kNumFaultKinds = 11;
const char* ToString(FaultKind kind);

// Numbers count from 0. A place is where a rank may lose the baton.
struct Fault {
  FaultKind kind;
  int rank = 0;
  int peer = 0;  // of a link: messages from `rank` to `peer`
  int64_t at = 0;
  absl::Duration length;
  int64_t fired = 0;  // how often it has happened
  absl::Time when;    // the first time
};
std::string ToString(const Fault& fault);
inline std::ostream& operator<<(std::ostream& os, const Fault& fault) {
  return os << ToString(fault);
}

}  // namespace dsd::sim

#endif  // DSD_BACKENDS_SIM_FAULT_H_
