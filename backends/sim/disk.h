// SPDX-License-Identifier: Apache-2.0
//
// What a process of a simulation sees of the disk that all of them share.

#ifndef DSD_BACKENDS_SIM_DISK_H_
#define DSD_BACKENDS_SIM_DISK_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "dsd/backends/sim/scheduler.h"
#include "dsd/core/base/env.h"

namespace dsd::sim {

// One operation, for those who inject faults.
struct DiskOperation {
  Scheduler::Process process;
  int64_t number;        // of the process
  int64_t write_number;  // of its writes; -1 if it is none
  const char* what;      // "write"
  std::string path;
  int64_t bytes = 0;  // of a write
  // Set to let the front of a write happen before the error.
  int64_t torn_bytes = 0;
};

struct DiskOptions {
  // Of one operation, at most.
  absl::Duration latency = absl::Microseconds(100);
  // May return an error that takes the operation's place, and kill processes.
  // Null: none.
  std::function<absl::Status(DiskOperation&)> fault;
};

// `disk` for threads of `process`: operations take time, and fail if the
// process is dead. All pointers are borrowed.
std::unique_ptr<FileSystem> MakeSimFileSystem(FileSystem* disk,
                                              Scheduler* scheduler,
                                              Scheduler::Process process,
                                              const DiskOptions* options);

}  // namespace dsd::sim

#endif  // DSD_BACKENDS_SIM_DISK_H_
