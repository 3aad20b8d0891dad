// SPDX-License-Identifier: Apache-2.0
//
// What the backend sets in UCX's configuration where the user has set nothing.

#ifndef DSD_BACKENDS_UCX_UCX_SETTINGS_H_
#define DSD_BACKENDS_UCX_UCX_SETTINGS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dsd {

// This host, as far as the settings depend on it.
struct UcxHost {
  // Of the options; may be empty.
  std::string bind_address;
  // The interface with `bind_address`; if that is empty, the one that leads to
  // the other ranks.
  std::string interface;
  bool is_loopback = false;
  // All interfaces, and the ports of RDMA devices that are up ("mlx5_0:1").
  std::vector<std::string> interfaces;
  std::vector<std::string> rdma_ports;
  // What is free for shared memory of POSIX; nullopt if it cannot be used.
  std::optional<uint64_t> shared_memory_bytes;
};

// Looks at this host. `towards`: the address through which the ranks meet, used
// if `bind_address` is empty. `shared_memory`, `rdma`: folders.
// Errors: InvalidArgument if no interface has the address.
absl::StatusOr<UcxHost> LookAtHost(
    const std::string& bind_address, const std::string& towards,
    const std::string& shared_memory = "/dev/shm",
    const std::string& rdma = "/sys/class/infiniband");

struct UcxSettings {
  // Names without "UCX_", and values, for ucp_config_modify.
  std::vector<std::pair<std::string, std::string>> options;
  // Something else than usual is used, and why; empty: nothing to tell.
  std::string warning;
  // The user has chosen when messages are rendezvous.
  bool user_rendezvous = false;
};

// `user`: the value of an option (without "UCX_") that the user has set in the
// environment or in UCX's file, else nullopt. What the user has set is never
// among the result.
// Errors: InvalidArgument if the user's devices contradict `bind_address`.
absl::StatusOr<UcxSettings> ChooseUcxSettings(
    const UcxHost& host,
    absl::FunctionRef<std::optional<std::string>(absl::string_view)> user);

}  // namespace dsd

#endif  // DSD_BACKENDS_UCX_UCX_SETTINGS_H_
