// SPDX-License-Identifier: Apache-2.0
//
// One simulated job with faults, all of it drawn from a seed.

#ifndef DSD_TESTING_FAULT_SIM_SEED_H_
#define DSD_TESTING_FAULT_SIM_SEED_H_

#include <cstdint>
#include <string>
#include <vector>

#include "dsd/backends/sim/fault.h"

namespace dsd {

// Planted on purpose, to see that the seeds find it.
enum class PlantedBug {
  kNone,
  kRenameBeforeSync,  // rank 0 forgets to sync
  kIgnoredVerdict,    // the last rank does not hear that its group has failed
  kEarlyReceive,      // the engine gives memory back before the bytes are there
};

struct SeedResult {
  std::string scenario;  // "save over on 3 ranks"
  std::vector<sim::Fault> faults;
  std::string failure;  // "": all went as it must
  uint64_t trace = 0;   // equal for equal runs
  int64_t steps = 0;
};

// Runs the job of `seed`. What must hold: it comes to an end; every survivor
// succeeds or has one typed error whose text names a fault that happened; what
// a call that succeeded delivered is right, but for bytes that a link changed;
// after a save, whatever happened, the directory holds the checkpoint before or
// the new one, and the new one if the save succeeded anywhere.
SeedResult RunSeed(uint64_t seed, PlantedBug bug = PlantedBug::kNone);

}  // namespace dsd

#endif  // DSD_TESTING_FAULT_SIM_SEED_H_
