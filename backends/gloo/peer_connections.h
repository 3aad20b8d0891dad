// SPDX-License-Identifier: Apache-2.0
//
// The connections that Gloo uses, made without it: Gloo takes whoever is first
// at a port for the peer, and what a stranger sends for messages. Private to
// this package.

#ifndef DSD_BACKENDS_GLOO_PEER_CONNECTIONS_H_
#define DSD_BACKENDS_GLOO_PEER_CONNECTIONS_H_

#include <atomic>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/comm/socket.h"

namespace dsd {

// One connection with each other rank, by rank; collective over the ranks of
// `options`. Both ends have shown each other what only the store told them.
// `host` is the number of the interface at which this rank listens meanwhile.
// Ranks with the same one are connected without the network, through a Unix
// socket.
//
// Errors: Aborted soon after `cancelled` is set and `waker` woken;
// DeadlineExceeded naming a rank that has not come; Unavailable;
// ResourceExhausted (descriptors).
absl::StatusOr<std::vector<Socket>> ConnectPeers(
    const EngineOptions& options, const std::string& host,
    const std::atomic<bool>& cancelled, Waker& waker, absl::Time deadline);

}  // namespace dsd

#endif  // DSD_BACKENDS_GLOO_PEER_CONNECTIONS_H_
