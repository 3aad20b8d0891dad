// SPDX-License-Identifier: Apache-2.0
//
// Those who are not of the job: they do not disturb it, they do not get in, and
// from other hosts they find nothing to connect to.

#include <dirent.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/no_destructor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "dsd/backends/gloo/gloo_backend.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store.h"
#include "dsd/core/comm/tcp_store.h"
#include "dsd/testing/harness/rank_processes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

constexpr int kRanks = 3;
constexpr char kToken[] = "0123456789abcdef";

absl::Time Soon() { return Env::Real()->Now() + absl::Seconds(20); }

// Rank 1 plays the strangers, while its own job runs.
absl::Status DisturbStore(const LaunchInfo& launch) {
  Env* const env = Env::Real();
  const std::string noise[] = {
      "",
      "GET / HTTP/1.1\r\n\r\n",
      std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8),
      std::string(100000, '\xff'),
      std::string(3, '\0'),
  };
  std::vector<Socket> held;  // to the end: they never hang up
  for (int i = 0; i < 300; ++i) {
    DSD_ASSIGN_OR_RETURN(Socket socket, ConnectTo(env, launch.master_addr,
                                                  launch.master_port, Soon()));
    // The store may hang up before all of it is sent.
    socket.WriteAll(env, noise[i % 5], Soon()).IgnoreError();
    held.push_back(std::move(socket));
  }
  TcpStoreOptions options;
  options.host = launch.master_addr;
  options.port = launch.master_port;
  options.job_id = launch.job_id;
  for (const char* token : {"", "another token of 16"}) {
    options.token = token;
    const absl::Status status = ConnectTcpStore(env, options, Soon()).status();
    if (!absl::IsPermissionDenied(status)) {
      return absl::InternalError(
          absl::StrCat("a stranger is told ", status.ToString()));
    }
  }
  return absl::OkStatus();
}

DSD_RANK_PROGRAM(Disturbed) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("gloo"));
  for (int i = 0; i < 3; ++i) {
    if (rank.rank() == 1) DSD_RETURN_IF_ERROR(DisturbStore(rank.launch()));
    DSD_RETURN_IF_ERROR(comm->Barrier());
    DSD_RETURN_IF_ERROR(comm->OpenLane(absl::StrCat(i)).status());
  }
  return comm->Shutdown();
}

TEST(StrangerTest, TheJobIsUnharmed) {
  RankRunOptions options;
  options.environment = {{"DSD_TOKEN", kToken}};
  EXPECT_THAT(RunRanks(kRanks, "Disturbed", options), AllRanksOk());
}

DSD_RANK_PROGRAM(OneWithAWrongToken) {
  LaunchInfo launch = rank.launch();
  if (rank.rank() == 2) launch.token = rank.argument();
  WorldOptions options;
  options.backend = "gloo";
  options.connect_timeout = absl::Seconds(2);
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectWorld(launch, options));
  return comm->Shutdown();
}

TEST(StrangerTest, ARankWithAWrongTokenIsToldAtOnce) {
  for (const char* token : {"another token of 16", ""}) {
    RankRunOptions options;
    options.environment = {{"DSD_TOKEN", kToken}};
    options.argument = token;
    const auto results = RunRanks(kRanks, "OneWithAWrongToken", options);
    EXPECT_EQ(results[2].status.code(), absl::StatusCode::kPermissionDenied);
    EXPECT_THAT(std::string(results[2].status.message()),
                HasSubstr("DSD_TOKEN"));
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(results[rank].status.code(),
                absl::StatusCode::kDeadlineExceeded);
      EXPECT_THAT(std::string(results[rank].status.message()),
                  HasSubstr("rank 2 of 3 did not connect"));
    }
  }
}

// --- Where the ranks listen ---

// Inodes of the sockets of this process.
std::set<std::string> OwnSockets() {
  std::set<std::string> inodes;
  DIR* const folder = opendir("/proc/self/fd");
  while (const dirent* entry = readdir(folder)) {
    char target[64];
    const ssize_t size =
        readlink(absl::StrCat("/proc/self/fd/", entry->d_name).c_str(), target,
                 sizeof(target));
    absl::string_view text(target, size < 0 ? 0 : size);
    if (absl::ConsumePrefix(&text, "socket:[")) {
      inodes.insert(std::string(absl::StripSuffix(text, "]")));
    }
  }
  closedir(folder);
  return inodes;
}

// The local addresses at which this process listens, as the kernel writes them.
std::set<std::string> Listening() {
  constexpr absl::string_view kListen = "0A";
  // First the table: what is closed after it is in it, but is not ours then.
  std::vector<std::pair<std::string, std::string>> found;
  for (const char* table : {"/proc/self/net/tcp", "/proc/self/net/tcp6"}) {
    std::ifstream in(table);
    std::string line;
    std::getline(in, line);
    while (std::getline(in, line)) {
      const std::vector<std::string> fields =
          absl::StrSplit(line, ' ', absl::SkipEmpty());
      if (fields.size() > 9 && fields[3] == kListen) {
        found.emplace_back(fields[9], fields[1]);
      }
    }
  }
  const std::set<std::string> own = OwnSockets();
  std::set<std::string> addresses;
  for (const auto& [inode, address] : found) {
    if (own.count(inode) > 0) addresses.insert(address);
  }
  return addresses;
}

std::set<std::string>& Seen() {
  static absl::NoDestructor<std::set<std::string>> seen;
  return *seen;
}

// The engine listens only until all ranks are connected: just then it tells the
// others where.
class LookingStore final : public ForwardingStore {
 public:
  explicit LookingStore(std::shared_ptr<Store> to)
      : ForwardingStore(std::move(to)) {}
  absl::Status Set(absl::string_view key, absl::string_view value,
                   absl::Time deadline) override {
    Seen().merge(Listening());
    return to_->Set(key, value, deadline);
  }
};

DSD_RANK_PROGRAM(LookWhereItListens) {
  static BackendDescriptor descriptor = GlooBackend();
  descriptor.create = [](const EngineOptions& options) {
    EngineOptions looking = options;
    looking.store = std::make_shared<LookingStore>(options.store);
    return GlooBackend().create(looking);
  };
  WorldOptions options;
  options.descriptor = &descriptor;
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectWorld(rank.launch(), options));
  DSD_RETURN_IF_ERROR(comm->Barrier());
  Seen().merge(Listening());
  rank.Record("seen", absl::StrJoin(Seen(), " "));
  return comm->Shutdown();
}

TEST(StrangerTest, NobodyListensBeyondTheAddressOfTheMaster) {
  const auto results = RunRanks(kRanks, "LookWhereItListens");
  ASSERT_THAT(results, AllRanksOk());
  for (int rank = 0; rank < kRanks; ++rank) {
    const std::vector<std::string> seen =
        absl::StrSplit(results[rank].values.at("seen"), ' ', absl::SkipEmpty());
    // The store, and the engine.
    EXPECT_GE(seen.size(), rank == 0 ? 2 : 1) << "rank " << rank;
    for (const std::string& address : seen) {
      EXPECT_TRUE(absl::StartsWith(address, "0100007F:"))
          << "rank " << rank << " listens at " << address;
    }
  }
}

}  // namespace
}  // namespace dsd
