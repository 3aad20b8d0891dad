// SPDX-License-Identifier: Apache-2.0
//
// The engine of the simulation: messages take time on links between processes,
// and links break.

#ifndef DSD_BACKENDS_SIM_NETWORK_H_
#define DSD_BACKENDS_SIM_NETWORK_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>

#include "absl/time/time.h"
#include "dsd/backends/sim/scheduler.h"
#include "dsd/core/comm/engine.h"

namespace dsd::sim {

struct LinkOptions {
  // A message of n bytes arrives after latency + n / bytes_per_second, and up
  // to `jitter` more; the bytes of one link go one after another.
  absl::Duration latency = absl::Microseconds(20);
  absl::Duration jitter = absl::Microseconds(20);
  double bytes_per_second = 1e9;
  // How many times slower than that a link may be: each draws its own, all
  // orders alike.
  double slowest_link = 1;
  // Messages up to here leave the sender's memory at once; longer ones are
  // taken from there when the receiver is ready.
  int64_t eager_bytes = 4096;
  // Whether messages of one link may overtake each other.
  bool overtaking = false;
  // Whether engines see that the other end has died, and how soon at most. If
  // not, only the store tells.
  bool reports_death = true;
  absl::Duration death_delay = absl::Milliseconds(10);
};

// What becomes of one message, for those who inject faults. Ranks are those of
// the communicator.
struct Fate {
  int from;
  int to;
  int64_t number;  // on its link
  size_t size;
  absl::Duration extra_delay;
  bool broken_before = false;
  bool broken_within = false;
  bool corrupt = false;
};

// What engines of one simulation share. Every engine whose Env is a SimEnv of
// this network belongs to it.
class Network {
 public:
  Network(Scheduler* scheduler, const LinkOptions& options);
  Network(const Network&) = delete;
  ~Network();

  // Called for each message as it is sent. Null: none.
  void SetFate(std::function<void(Fate&)> fate);
  // The process is dead: its links end.
  void ProcessDied(Scheduler::Process process);
  // Messages that have arrived before another one to the same rank that was
  // sent earlier, on another link.
  int64_t overtakes() const;

  class Hub;

 private:
  friend class SimEngine;
  Scheduler* const scheduler_;
  const LinkOptions options_;
  std::function<void(Fate&)> fate_;
  std::map<int64_t, std::weak_ptr<Hub>> hubs_;
  int64_t next_hub_ = 0;
  int64_t overtakes_ = 0;
};

}  // namespace dsd::sim

namespace dsd {

// For CommunicatorOptions::descriptor; the communicator's Env must be a
// sim::SimEnv with a network.
const BackendDescriptor& SimBackend();

}  // namespace dsd

#endif  // DSD_BACKENDS_SIM_NETWORK_H_
