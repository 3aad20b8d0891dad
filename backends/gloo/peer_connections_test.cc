// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/gloo/peer_connections.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

using Connections = absl::StatusOr<std::vector<Socket>>;

constexpr char kHost[] = "127.0.0.1";
constexpr char kOtherHost[] = "127.0.0.2";  // this one, too

class PeerConnectionsTest : public testing::Test {
 protected:
  Connections Connect(int rank, int world_size, const std::string& host = kHost,
                      absl::Duration timeout = absl::Seconds(30)) {
    EngineOptions options;
    options.rank = rank;
    options.world_size = world_size;
    options.env = env_;
    options.store = store_;
    return ConnectPeers(options, host, cancelled_, waker_,
                        env_->Now() + timeout);
  }

  // All ranks at once, the ranks of `hosts`.
  std::vector<Connections> ConnectAll(const std::vector<std::string>& hosts) {
    std::vector<Connections> results(hosts.size());
    std::vector<std::thread> ranks;
    for (size_t rank = 0; rank < hosts.size(); ++rank) {
      ranks.emplace_back([&, rank] {
        results[rank] = Connect(rank, hosts.size(), hosts[rank]);
      });
    }
    for (std::thread& rank : ranks) rank.join();
    return results;
  }

  absl::Time deadline() { return env_->Now() + absl::Seconds(30); }

  std::vector<std::string> PlaceOf(int rank) {
    const absl::StatusOr<std::string> place =
        store_->Get(absl::StrCat("gloo/", rank), deadline());
    EXPECT_TRUE(place.ok()) << place.status();
    return absl::StrSplit(*place, absl::MaxSplits(' ', 3));
  }

  Socket CallByNetwork(const std::vector<std::string>& place) {
    const absl::StatusOr<Address> address = ParseAddress(place[3]);
    EXPECT_TRUE(address.ok()) << address.status();
    absl::StatusOr<Socket> socket =
        ConnectOnce(env_, address->host, address->port, deadline());
    EXPECT_TRUE(socket.ok()) << socket.status();
    return *std::move(socket);
  }

  Socket CallLocally(const std::vector<std::string>& place) {
    Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    std::string name;
    EXPECT_TRUE(absl::HexStringToBytes(place[2], &name));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, name.data(), name.size());
    EXPECT_EQ(connect(socket.fd(), reinterpret_cast<sockaddr*>(&address),
                      offsetof(sockaddr_un, sun_path) + name.size()),
              0);
    return socket;
  }

  // `from` is the end of `sender` at `receiver`, and the reverse.
  void ExpectConnected(std::vector<Connections>& all, int sender,
                       int receiver) {
    const std::string text = absl::StrCat(sender, " to ", receiver);
    EXPECT_EQ((*all[sender])[receiver].WriteAll(env_, text, deadline()),
              absl::OkStatus());
    const absl::StatusOr<std::string> got =
        (*all[receiver])[sender].ReadExactly(env_, text.size(), deadline());
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(*got, text);
  }

  static int FamilyOf(const Socket& socket) {
    sockaddr_storage address;
    socklen_t size = sizeof(address);
    getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&address), &size);
    return address.ss_family;
  }

  Env* const env_ = Env::Real();
  std::shared_ptr<Store> store_ = MakeInProcessStore(env_);
  std::atomic<bool> cancelled_{false};
  Waker waker_ = *Waker::Create();
};

TEST_F(PeerConnectionsTest, EachRankReachesEachOther) {
  for (const int world_size : {1, 2, 3, 7}) {
    store_ = MakeInProcessStore(env_);
    std::vector<Connections> all =
        ConnectAll(std::vector<std::string>(world_size, kHost));
    for (int a = 0; a < world_size; ++a) {
      ASSERT_TRUE(all[a].ok()) << all[a].status();
      ASSERT_EQ(all[a]->size(), world_size);
      EXPECT_FALSE((*all[a])[a].valid());
    }
    for (int a = 0; a < world_size; ++a) {
      for (int b = 0; b < world_size; ++b) {
        if (a != b) ExpectConnected(all, a, b);
      }
    }
  }
}

TEST_F(PeerConnectionsTest, TheNetworkIsBetweenHosts) {
  std::vector<Connections> all = ConnectAll({kHost, kOtherHost, kHost});
  for (const Connections& one : all) ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_EQ(FamilyOf((*all[0])[1]), AF_INET);
  EXPECT_EQ(FamilyOf((*all[2])[1]), AF_INET);
  EXPECT_EQ(FamilyOf((*all[0])[2]), AF_UNIX);
  ExpectConnected(all, 0, 1);
  ExpectConnected(all, 1, 2);
  ExpectConnected(all, 2, 0);
}

// As where the other rank sees another set of Unix sockets.
TEST_F(PeerConnectionsTest, TheNetworkIsThereIfNothingElseIs) {
  Connections first;
  std::thread rank([&] { first = Connect(0, 2); });
  std::vector<std::string> place = PlaceOf(0);
  place[2] = absl::BytesToHexString(std::string("\0nobody", 7));
  auto other = MakeInProcessStore(env_);
  ASSERT_TRUE(other->Set("gloo/0", absl::StrJoin(place, " "), deadline()).ok());
  store_ = other;
  const Connections second = Connect(1, 2);
  rank.join();
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(FamilyOf((*first)[1]), AF_INET);
}

TEST_F(PeerConnectionsTest, StrangersAreNotTakenForRanks) {
  Connections first;
  std::thread rank([&] { first = Connect(0, 2); });
  const std::vector<std::string> place = PlaceOf(0);
  std::string secret;
  ASSERT_TRUE(absl::HexStringToBytes(place[0], &secret));
  const std::string wrong(secret.size(), 'x');
  const std::string one("\1\0\0\0", 4);
  const std::string two("\2\0\0\0", 4);
  const std::string zero(4, '\0');
  const std::vector<std::string> greetings = {
      "",                      // nothing
      "GET / HTTP/1.1\r\n",    // less than a greeting
      std::string(1000, '?'),  // more
      wrong + one,             // without the secret
      secret + zero,           // as if it were this rank
      secret + two,            // or one that does not exist
      secret + std::string(4, '\xff'),
  };
  std::vector<Socket> open;
  for (const bool stays : {false, true}) {
    for (const std::string& greeting : greetings) {
      for (const bool local : {false, true}) {
        Socket stranger = local ? CallLocally(place) : CallByNetwork(place);
        ASSERT_TRUE(stranger.valid());
        EXPECT_EQ(stranger.WriteAll(env_, greeting, deadline()),
                  absl::OkStatus());
        if (stays) open.push_back(std::move(stranger));
      }
    }
  }
  for (int i = 0; i < 300; ++i) open.push_back(CallByNetwork(place));

  std::vector<Connections> all(2);
  all[1] = Connect(1, 2);
  rank.join();
  all[0] = std::move(first);
  for (const Connections& connections : all) {
    ASSERT_TRUE(connections.ok()) << connections.status();
  }
  ExpectConnected(all, 0, 1);
  ExpectConnected(all, 1, 0);
}

TEST_F(PeerConnectionsTest, ARankComesOnce) {
  Connections first;
  std::thread rank([&] { first = Connect(0, 3); });
  const std::vector<std::string> place = PlaceOf(0);
  std::string secret;
  ASSERT_TRUE(absl::HexStringToBytes(place[0], &secret));
  std::vector<Socket> callers;
  for (const char caller : {1, 1, 2}) {
    callers.push_back(CallByNetwork(place));
    EXPECT_EQ(callers.back().WriteAll(
                  env_, secret + std::string({caller, 0, 0, 0}), deadline()),
              absl::OkStatus());
    const absl::StatusOr<std::string> answer =
        callers.back().ReadExactly(env_, secret.size(), deadline());
    if (callers.size() == 2) {
      EXPECT_EQ(answer.status().code(), absl::StatusCode::kUnavailable);
    } else {
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_EQ(absl::BytesToHexString(*answer), place[1]);
    }
  }
  rank.join();
  EXPECT_TRUE(first.ok()) << first.status();
}

TEST_F(PeerConnectionsTest, WhoAnswersMustBeTheRank) {
  const absl::StatusOr<Socket> listener = ListenAt(env_, kHost, 0, deadline());
  ASSERT_TRUE(listener.ok()) << listener.status();
  const std::string secret(2 * kNonceBytes, 'a');
  ASSERT_TRUE(store_
                  ->Set("gloo/0",
                        absl::StrCat(secret, " ", secret, "  ",
                                     *listener->LocalPort(), " ", kHost),
                        deadline())
                  .ok());
  for (const bool answers : {true, false}) {
    Connections result;
    std::thread rank([&] { result = Connect(1, 2); });
    Socket caller;
    while (!caller.valid()) caller = *AcceptFrom(*listener);
    if (answers) {
      EXPECT_EQ(
          caller.WriteAll(env_, std::string(kNonceBytes, 'b'), deadline()),
          absl::OkStatus());
    } else {
      caller.Close();
    }
    rank.join();
    EXPECT_EQ(result.status().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(result.status().message()), HasSubstr("rank 0"));
  }
}

TEST_F(PeerConnectionsTest, WhoHasNotComeIsNamed) {
  const Connections below = Connect(1, 2, kHost, absl::Milliseconds(50));
  EXPECT_EQ(below.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(below.status().message()),
              HasSubstr("rank 0 has not said where it listens"));
  const Connections above = Connect(0, 3, kHost, absl::Milliseconds(50));
  EXPECT_EQ(above.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(above.status().message()),
              HasSubstr("no connection to rank 1 in time"));
}

TEST_F(PeerConnectionsTest, ACancelEndsIt) {
  Connections result;
  std::thread rank([&] { result = Connect(0, 2); });
  PlaceOf(0);
  cancelled_ = true;
  waker_.Wake();
  rank.join();
  EXPECT_EQ(result.status().code(), absl::StatusCode::kAborted);
}

TEST_F(PeerConnectionsTest, APlaceThatIsNoneIsAnError) {
  for (const char* const place :
       {"", "00 00", "0g 00 00 1 h", "00 00 00 x h"}) {
    ASSERT_TRUE(store_->Set("gloo/0", place, deadline()).ok());
    EXPECT_EQ(Connect(1, 2).status().code(), absl::StatusCode::kDataLoss)
        << place;
  }
}

}  // namespace
}  // namespace dsd
