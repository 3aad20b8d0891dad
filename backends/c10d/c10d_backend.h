// SPDX-License-Identifier: Apache-2.0
//
// A communicator over a process group that the user has already, so that no
// second set of connections is made.

#ifndef DSD_BACKENDS_C10D_C10D_BACKEND_H_
#define DSD_BACKENDS_C10D_C10D_BACKEND_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "c10/util/intrusive_ptr.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/engine.h"

namespace c10d {
class Backend;
class ProcessGroup;
}  // namespace c10d

namespace dsd {

struct ProcessGroupOptions {
  Env* env = Env::Real();
  // The name of the group in error texts.
  std::string group = "process group";
  // A name or number of rank 0's host that all ranks reach. Empty: MASTER_ADDR
  // of the environment, else 127.0.0.1.
  std::string store_host;
  // See WorldOptions.
  absl::Duration heartbeat_bound = absl::Seconds(30);
  absl::Duration connect_timeout = absl::Minutes(2);
};

// Messages travel as sends and receives of tensors in host memory through the
// group's own connections. Beside them there is one control connection from
// each rank to rank 0, which serves them at `store_host` at a free port: a
// process group does not tell who died. Only who knows a token gets in there,
// which rank 0 tells through the group.
//
// Collective over the ranks of the group, which call it in the same order if
// they call it more than once. The group must be able to send, receive and
// receive from any rank, with tags; Gloo's can. While the communicator lives
// other uses of the group come from the same thread, or from none while a call
// is in progress. After a failed call, one that ran out of time included, the
// group is as unusable as after a failed call of its own.
//
// Errors: those of Communicator::Create; InvalidArgument for a group without a
// backend for host memory.
absl::StatusOr<std::unique_ptr<Communicator>> ConnectOverProcessGroup(
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ProcessGroupOptions& options = {});
absl::StatusOr<std::unique_ptr<Communicator>> ConnectOverProcessGroup(
    const c10::intrusive_ptr<c10d::Backend>& group,
    const ProcessGroupOptions& options = {});

// The engine alone, for backends that make a process group of their own.
// `group` has options.rank and options.world_size.
std::unique_ptr<Engine> MakeC10dEngine(
    const EngineOptions& options,
    const c10::intrusive_ptr<c10d::Backend>& group);

}  // namespace dsd

#endif  // DSD_BACKENDS_C10D_C10D_BACKEND_H_
