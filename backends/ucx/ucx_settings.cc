// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/ucx/ucx_settings.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <memory>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace dsd {
namespace {

// A process takes about half of it when it connects; with less UCX fails or,
// worse, is killed when it touches what it has got.
constexpr uint64_t kSharedMemoryBytes = uint64_t{16} << 20;

std::string NumberOf(const sockaddr* address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address == nullptr) return "";
  if (address->sa_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(address)->sin_addr,
              text, sizeof(text));
  } else if (address->sa_family == AF_INET6) {
    inet_ntop(AF_INET6,
              &reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr, text,
              sizeof(text));
  }
  return text;
}

// All of 127.0.0.0/8 is this host.
bool IsLoopback(absl::string_view address) {
  return absl::StartsWith(address, "127.") || address == "::1";
}

std::vector<std::string> Names(const std::string& folder) {
  std::vector<std::string> names;
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(folder.c_str()),
                                                &closedir);
  if (dir == nullptr) return names;
  while (const dirent* entry = readdir(dir.get())) {
    if (entry->d_name[0] != '.') names.push_back(entry->d_name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> ActivePorts(const std::string& rdma) {
  std::vector<std::string> found;
  for (const std::string& device : Names(rdma)) {
    const std::string ports = absl::StrCat(rdma, "/", device, "/ports");
    for (const std::string& port : Names(ports)) {
      std::ifstream in(absl::StrCat(ports, "/", port, "/state"));
      std::string line;
      std::getline(in, line);  // "4: ACTIVE"
      if (absl::EndsWith(line, "ACTIVE")) {
        found.push_back(absl::StrCat(device, ":", port));
      }
    }
  }
  return found;
}

}  // namespace

absl::StatusOr<UcxHost> LookAtHost(const std::string& bind_address,
                                   const std::string& towards,
                                   const std::string& shared_memory,
                                   const std::string& rdma) {
  UcxHost host;
  host.bind_address = bind_address;
  const std::string& address = bind_address.empty() ? towards : bind_address;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) {
    return absl::UnavailableError(absl::StrCat(
        "cannot list the network interfaces: ", std::strerror(errno)));
  }
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(all, &freeifaddrs);
  for (const ifaddrs* one = all; one != nullptr; one = one->ifa_next) {
    const std::string name(one->ifa_name);
    if (!absl::c_linear_search(host.interfaces, name)) {
      host.interfaces.push_back(name);
    }
    const bool is_loopback = (one->ifa_flags & IFF_LOOPBACK) != 0;
    const bool is_it =
        IsLoopback(address) ? is_loopback : NumberOf(one->ifa_addr) == address;
    if (is_it && host.interface.empty()) {
      host.interface = name;
      host.is_loopback = is_loopback;
    }
  }
  if (host.interface.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(bind_address.empty() ? "address " : "bind_address \"",
                     address, bind_address.empty() ? "" : "\"",
                     ": no interface of this host has it"));
  }
  host.rdma_ports = ActivePorts(rdma);
  struct statvfs space;
  if (statvfs(shared_memory.c_str(), &space) == 0) {
    host.shared_memory_bytes = uint64_t{space.f_bavail} * space.f_bsize;
  }
  return host;
}

absl::StatusOr<UcxSettings> ChooseUcxSettings(
    const UcxHost& host,
    absl::FunctionRef<std::optional<std::string>(absl::string_view)> user) {
  UcxSettings settings;
  const auto set = [&](absl::string_view name, absl::string_view value) {
    if (!user(name).has_value()) settings.options.emplace_back(name, value);
  };

  // UCX listens on all interfaces of its devices, which by default are all.
  if (const auto devices = user("NET_DEVICES"); !devices.has_value()) {
    std::vector<std::string> chosen = {host.interface};
    // Who names an address wants that network and no other.
    if (host.bind_address.empty() && !host.is_loopback) {
      chosen.insert(chosen.end(), host.rdma_ports.begin(),
                    host.rdma_ports.end());
    }
    set("NET_DEVICES", absl::StrJoin(chosen, ","));
  } else if (!host.bind_address.empty()) {
    for (absl::string_view device : absl::StrSplit(*devices, ',')) {
      if (device != host.interface &&
          (device == "all" || absl::c_linear_search(host.interfaces, device) ||
           absl::StrContains(device, '*') || absl::StartsWith(device, "^"))) {
        return absl::InvalidArgumentError(absl::StrCat(
            "UCX_NET_DEVICES=", *devices, " contradicts bind_address \"",
            host.bind_address, "\", which is on interface ", host.interface,
            ": unset one of them"));
      }
    }
  }

  // Else peer error handling would exclude shared memory.
  if (!user("POSIX_ERROR_HANDLING").has_value() &&
      !user("SYSV_ERROR_HANDLING").has_value()) {
    set("MM_ERROR_HANDLING", "y");
  }
  // The usual 64 places are filled, and emptied, in less time than it takes to
  // wake the other side. The memory of them all is there anyway.
  if (!user("POSIX_FIFO_SIZE").has_value() &&
      !user("SYSV_FIFO_SIZE").has_value()) {
    set("MM_FIFO_SIZE", "256");
  }
  // Fewer and longer calls of the system: a quarter less time of the processor
  // than with the usual 8 and 64 KiB.
  if (!user("TCP_TX_SEG_SIZE").has_value() &&
      !user("TCP_RX_SEG_SIZE").has_value()) {
    set("TCP_TX_SEG_SIZE", "256k");
    set("TCP_RX_SEG_SIZE", "256k");
  }
  // By default a rank that dies in an idle group is noticed after 20 s.
  set("KEEPALIVE_INTERVAL", "1s");

  if (!user("TLS").has_value() && !user("POSIX_DIR").has_value() &&
      host.shared_memory_bytes.value_or(0) < kSharedMemoryBytes) {
    settings.options.emplace_back("TLS", "^posix");
    settings.warning = absl::StrCat(
        "backend \"ucx\": /dev/shm has ",
        host.shared_memory_bytes.has_value()
            ? absl::StrCat("only ", *host.shared_memory_bytes >> 10,
                           " KiB free")
            : "no file system",
        ", so ranks of this host use other transports than POSIX shared "
        "memory; "
        "give it ",
        kSharedMemoryBytes >> 20, " MiB per rank, or set UCX_TLS");
  }
  settings.user_rendezvous = user("RNDV_THRESH").has_value();
  return settings;
}

}  // namespace dsd
