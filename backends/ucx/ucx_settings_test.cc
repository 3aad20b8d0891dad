// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/ucx/ucx_settings.h"

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Key;
using ::testing::Not;
using ::testing::Pair;

// Names and values; without "UCX_".
using Options = std::map<std::string, std::string>;

absl::StatusOr<UcxSettings> Choose(const UcxHost& host,
                                   const Options& user = {}) {
  return ChooseUcxSettings(
      host, [&](absl::string_view name) -> std::optional<std::string> {
        const auto it = user.find(std::string(name));
        if (it == user.end()) return std::nullopt;
        return it->second;
      });
}

UcxHost AHost() {
  UcxHost host;
  host.interface = "eth1";
  host.interfaces = {"lo", "eth0", "eth1"};
  host.rdma_ports = {"mlx5_0:1", "mlx5_1:1"};
  host.shared_memory_bytes = uint64_t{1} << 30;
  return host;
}

TEST(UcxSettingsTest, SharedMemoryStaysWithPeerErrorHandling) {
  const auto settings = Choose(AHost());
  ASSERT_TRUE(settings.ok()) << settings.status();
  EXPECT_THAT(settings->options, Contains(Pair("MM_ERROR_HANDLING", "y")));
  EXPECT_THAT(settings->options, Contains(Pair("KEEPALIVE_INTERVAL", "1s")));
  EXPECT_THAT(settings->options, Not(Contains(Key("TLS"))));
  EXPECT_EQ(settings->warning, "");
  EXPECT_FALSE(settings->user_rendezvous);
}

TEST(UcxSettingsTest, TheInterfaceTowardsTheOthersAndRdmaAreUsed) {
  UcxHost host = AHost();
  EXPECT_THAT(Choose(host)->options,
              Contains(Pair("NET_DEVICES", "eth1,mlx5_0:1,mlx5_1:1")));
  host.interface = "lo";
  host.is_loopback = true;
  EXPECT_THAT(Choose(host)->options, Contains(Pair("NET_DEVICES", "lo")));
}

TEST(UcxSettingsTest, AnAddressMeansItsInterfaceAndNoOther) {
  UcxHost host = AHost();
  host.bind_address = "10.0.0.1";
  EXPECT_THAT(Choose(host)->options, Contains(Pair("NET_DEVICES", "eth1")));
}

TEST(UcxSettingsTest, DevicesOfTheUserThatContradictTheAddressAreAnError) {
  UcxHost host = AHost();
  for (const char* devices : {"all", "eth0", "eth1,eth0", "^lo", "eth*"}) {
    host.bind_address = "";
    EXPECT_TRUE(Choose(host, {{"NET_DEVICES", devices}}).ok()) << devices;
    host.bind_address = "10.0.0.1";
    const auto settings = Choose(host, {{"NET_DEVICES", devices}});
    EXPECT_EQ(settings.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(
        std::string(settings.status().message()),
        HasSubstr(absl::StrCat("UCX_NET_DEVICES=", devices,
                               " contradicts bind_address \"10.0.0.1\"")));
  }
  for (const char* devices : {"eth1", "eth1,mlx5_0:1", "mlx5_0:1"}) {
    EXPECT_TRUE(Choose(host, {{"NET_DEVICES", devices}}).ok()) << devices;
  }
}

TEST(UcxSettingsTest, NothingThatTheUserHasSetIsSet) {
  UcxHost host = AHost();
  host.shared_memory_bytes = 0;
  const auto ours = Choose(host);
  Options user;
  for (const auto& [name, value] : ours->options) user[name] = "x";
  ASSERT_EQ(user.count("TLS"), 1);
  EXPECT_THAT(Choose(host, user)->options, ElementsAre());
  // For one kind of shared memory.
  for (const char* kind : {"POSIX", "SYSV"}) {
    const auto settings =
        Choose(AHost(), {{absl::StrCat(kind, "_ERROR_HANDLING"), "n"},
                         {absl::StrCat(kind, "_FIFO_SIZE"), "64"}});
    EXPECT_THAT(settings->options, Not(Contains(Key("MM_ERROR_HANDLING"))));
    EXPECT_THAT(settings->options, Not(Contains(Key("MM_FIFO_SIZE"))));
  }
  EXPECT_THAT(Choose(AHost(), {{"TCP_RX_SEG_SIZE", "16k"}})->options,
              Not(Contains(Key("TCP_TX_SEG_SIZE"))));
  EXPECT_TRUE(Choose(AHost(), {{"RNDV_THRESH", "1m"}})->user_rendezvous);
}

TEST(UcxSettingsTest, LittleSharedMemoryIsNotUsedAndTheUserIsTold) {
  UcxHost host = AHost();
  host.shared_memory_bytes = 64 << 10;
  auto settings = Choose(host);
  ASSERT_TRUE(settings.ok());
  EXPECT_THAT(settings->options, Contains(Pair("TLS", "^posix")));
  EXPECT_THAT(settings->warning, HasSubstr("only 64 KiB free"));
  host.shared_memory_bytes.reset();
  EXPECT_THAT(Choose(host)->warning, HasSubstr("no file system"));
  // Who chose the transports, or another folder, has looked.
  EXPECT_EQ(Choose(host, {{"TLS", "posix,self"}})->warning, "");
  EXPECT_EQ(Choose(host, {{"POSIX_DIR", "/tmp"}})->warning, "");
}

TEST(LookAtHostTest, AllOfLoopbackIsTheLoopbackInterface) {
  for (const char* address : {"127.0.0.1", "127.1.2.3"}) {
    const auto host = LookAtHost(address, "");
    ASSERT_TRUE(host.ok()) << host.status();
    EXPECT_EQ(host->interface, "lo");
    EXPECT_TRUE(host->is_loopback);
    EXPECT_THAT(host->interfaces, Contains("lo"));
  }
  EXPECT_EQ(LookAtHost("", "127.0.0.1")->interface, "lo");
}

TEST(LookAtHostTest, AnAddressThatIsNotHereIsNamed) {
  // For documentation; nobody's.
  const auto bound = LookAtHost("192.0.2.1", "127.0.0.1");
  EXPECT_EQ(bound.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bound.status().message()),
              HasSubstr("bind_address \"192.0.2.1\""));
  EXPECT_THAT(std::string(LookAtHost("", "192.0.2.1").status().message()),
              HasSubstr("address 192.0.2.1"));
}

TEST(LookAtHostTest, OnlyRdmaPortsThatAreUpAreFound) {
  const std::string root =
      absl::StrCat(::testing::TempDir(), "/infiniband_", getpid());
  const auto port = [&](const std::string& device, const std::string& number,
                        const std::string& state) {
    const std::string ports = absl::StrCat(root, "/", device, "/ports");
    for (const std::string& folder :
         {root, absl::StrCat(root, "/", device), ports,
          absl::StrCat(ports, "/", number)}) {
      mkdir(folder.c_str(), 0700);
    }
    std::ofstream(absl::StrCat(ports, "/", number, "/state")) << state << "\n";
  };
  port("mlx5_0", "1", "4: ACTIVE");
  port("mlx5_0", "2", "1: DOWN");
  port("hfi1_0", "1", "4: ACTIVE");
  const auto host = LookAtHost("", "127.0.0.1", "/nowhere", root);
  ASSERT_TRUE(host.ok()) << host.status();
  EXPECT_THAT(host->rdma_ports, ElementsAre("hfi1_0:1", "mlx5_0:1"));
  EXPECT_FALSE(host->shared_memory_bytes.has_value());
  EXPECT_THAT(LookAtHost("", "127.0.0.1", "/", "/nowhere")->rdma_ports,
              ElementsAre());
}

}  // namespace
}  // namespace dsd
