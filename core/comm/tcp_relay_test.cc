// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/tcp_relay.h"

#include <sys/resource.h>

#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/notification.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/base/version.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/rebuild.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store_frames.h"
#include "dsd/core/comm/store_protocol.h"
#include "dsd/core/comm/tcp_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr absl::Duration kBound = absl::Seconds(2);
constexpr char kToken[] = "0123456789abcdef";

using test::HelloFrame;
using test::In;
using test::JoinFrame;
using test::OkReplyTo;
using test::PassFrame;
using test::ReadFrame;
using test::ReadToEnd;
using test::Soon;
using test::WelcomeFrame;

Env* const env = Env::Real();

std::string Open(uint64_t channel, int rank) {
  return FrameWriter(FrameKind::kOpen, channel).Put(int32_t{rank}).Finish();
}

void Say(Socket& socket, const std::string& bytes) {
  EXPECT_EQ(socket.WriteAll(env, bytes, Soon()), absl::OkStatus());
}

FrameKind KindOf(const std::string& body) {
  return static_cast<FrameKind>(FrameReader(body).Get<uint8_t>());
}
uint64_t IdOf(const std::string& body) {
  FrameReader reader(body);
  reader.Get<uint8_t>();
  return reader.Get<uint64_t>();
}
FrameReader FieldsOf(const std::string& body) {
  FrameReader reader(body);
  reader.Get<uint8_t>();
  reader.Get<uint64_t>();
  return reader;
}

// The next frame of this kind.
std::string ReadKind(Socket& socket, FrameKind kind) {
  while (true) {
    const std::string body = ReadFrame(socket);
    if (body.empty() || KindOf(body) == kind) return body;
  }
}

Socket AcceptAt(const Socket& listener) {
  pollfd poll = {listener.fd(), POLLIN, 0};
  EXPECT_EQ(*env->Poll(absl::MakeSpan(&poll, 1), Soon()), 1);
  return *AcceptFrom(listener);
}

// Connections that the kernel of this host has at this port.
int ConnectionsAt(int port) {
  constexpr absl::string_view kEstablished = "01";
  const std::string end = absl::StrFormat(":%04X", port);
  std::ifstream in("/proc/self/net/tcp");
  std::string line;
  std::getline(in, line);
  int count = 0;
  while (std::getline(in, line)) {
    const std::vector<std::string> fields =
        absl::StrSplit(line, ' ', absl::SkipEmpty());
    count += fields.size() > 3 && absl::EndsWith(fields[1], end) &&
             fields[3] == kEstablished;
  }
  return count;
}

// A rank that takes part, as the communicator of a process does.
class Rank {
 public:
  Rank(std::shared_ptr<Store> store, int rank, int size)
      : store_(std::move(store)) {
    options_.group = "g";
    options_.rank = rank;
    options_.size = size;
    options_.on_failure = [this](const absl::Status& status) {
      verdict_ = status;
      heard_.Notify();
    };
    options_.on_question = [rank](absl::string_view question) {
      return absl::StrCat(question, " ", rank);
    };
  }

  absl::Status Join(absl::Time deadline = Soon()) {
    DSD_ASSIGN_OR_RETURN(membership_, store_->Join(options_, deadline));
    return absl::OkStatus();
  }
  Membership& membership() { return *membership_; }
  Store& store() { return *store_; }
  bool heard() const { return heard_.HasBeenNotified(); }
  // Waits for it.
  std::string Verdict() {
    EXPECT_TRUE(heard_.WaitForNotificationWithTimeout(absl::Seconds(30)));
    return heard() ? verdict_.ToString() : "none";
  }
  // As the process ends that has it.
  void End() {
    membership_.reset();
    store_.reset();
  }

 private:
  MemberOptions options_;
  std::shared_ptr<Store> store_;
  std::unique_ptr<Membership> membership_;
  absl::Status verdict_;
  absl::Notification heard_;
};

// Where a client is sent.
struct Place {
  StoreRole role = StoreRole::kClient;
  int relay_rank = 0;
  std::string address;
};

class TcpRelayTest : public ::testing::Test {
 protected:
  void Serve(int fan_out, absl::Duration bound = absl::Seconds(30),
             absl::string_view token = "") {
    TcpStoreServerOptions options;
    options.job_id = "job";
    options.heartbeat_bound = bound;
    options.fan_out = fan_out;
    options.token = std::string(token);
    absl::StatusOr<std::unique_ptr<TcpStoreServer>> started =
        TcpStoreServer::Start(env, options, Soon());
    ASSERT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
    port_ = server_->port();
    token_ = std::string(token);
  }

  TcpStoreOptions ClientOf(int rank) const {
    TcpStoreOptions options;
    options.port = port_;
    options.job_id = "job";
    options.rank = rank;
    options.may_relay = true;
    options.token = token_;
    return options;
  }

  absl::StatusOr<std::shared_ptr<Store>> Connect(int rank) {
    return ConnectTcpStore(env, ClientOf(rank), Soon());
  }

  // Ranks that connect; those that relay before those whom they serve.
  std::vector<std::unique_ptr<Rank>> ConnectAll(const std::vector<int>& ranks,
                                                int size) {
    std::vector<std::unique_ptr<Rank>> all;
    for (const int rank : ranks) {
      absl::StatusOr<std::shared_ptr<Store>> store = Connect(rank);
      EXPECT_TRUE(store.ok()) << "rank " << rank << ": " << store.status();
      if (!store.ok()) break;
      all.push_back(std::make_unique<Rank>(*std::move(store), rank, size));
    }
    return all;
  }

  static void JoinAll(const std::vector<std::unique_ptr<Rank>>& ranks) {
    std::vector<std::thread> threads;
    for (const std::unique_ptr<Rank>& rank : ranks) {
      threads.emplace_back(
          [&rank] { EXPECT_EQ(rank->Join(), absl::OkStatus()); });
    }
    for (std::thread& thread : threads) thread.join();
  }

  Socket Raw(int port) {
    absl::StatusOr<Socket> socket = ConnectTo(env, "127.0.0.1", port, Soon());
    EXPECT_TRUE(socket.ok()) << socket.status();
    return *std::move(socket);
  }

  // As a client does.
  Place Greet(Socket& socket, int rank) {
    const std::string nonce = NewNonce(env);
    Say(socket, HelloFrame(rank, kLibraryVersion, nonce));
    std::string body = ReadFrame(socket);
    if (!token_.empty()) {
      EXPECT_EQ(KindOf(body), FrameKind::kChallenge);
      Say(socket, FrameWriter(FrameKind::kProof, 0)
                      .Put(*TokenProof(token_, TokenSide::kClient, "job", nonce,
                                       FieldsOf(body).GetText()))
                      .Finish());
      body = ReadFrame(socket);
    }
    FrameReader reader = FieldsOf(body);
    EXPECT_EQ(reader.GetStatus(), absl::OkStatus());
    reader.Get<int64_t>();
    reader.GetText();
    Place place;
    place.role = static_cast<StoreRole>(reader.Get<uint8_t>());
    place.relay_rank = reader.Get<int32_t>();
    place.address = std::string(reader.GetText());
    EXPECT_TRUE(reader.ok());
    return place;
  }

  // A rank that is to relay, and whose clients are what the test says.
  Socket BeRelay(int rank) {
    Socket socket = Raw(port_);
    EXPECT_EQ(Greet(socket, rank).role, StoreRole::kRelay);
    return socket;
  }

  // The port to which a rank is sent.
  int PortFor(int rank) {
    Socket socket = Raw(port_);
    const Place place = Greet(socket, rank);
    EXPECT_EQ(place.role, StoreRole::kElsewhere);
    const absl::StatusOr<Address> address = ParseAddress(place.address);
    EXPECT_TRUE(address.ok()) << "\"" << place.address << "\"";
    if (!address.ok()) return 0;
    EXPECT_EQ(address->host, "127.0.0.1");
    return address->port;
  }

  std::unique_ptr<TcpStoreServer> server_;
  int port_ = 0;
  std::string token_;
};

TEST_F(TcpRelayTest, ThroughARelayAllIsAsItIsAtTheServer) {
  Serve(/*fan_out=*/2, kBound);
  const auto ranks = ConnectAll({0, 1, 2, 3, 4, 5}, 6);
  ASSERT_EQ(ranks.size(), 6);
  Store& leaf = ranks[3]->store();
  Store& other = ranks[5]->store();
  EXPECT_EQ(leaf.server_host(), "127.0.0.1");
  EXPECT_EQ(leaf.Set("key", std::string("a\0b", 3), Soon()), absl::OkStatus());
  EXPECT_EQ(*other.Get("key", Soon()), std::string("a\0b", 3));
  EXPECT_EQ(*ranks[0]->store().Get("key", Soon()), std::string("a\0b", 3));
  EXPECT_EQ(*other.Add("n", 5, Soon()), 5);
  EXPECT_EQ(*leaf.Add("n", -7, Soon()), -2);
  EXPECT_EQ(leaf.Set("big", std::string(kMaxValueBytes, 'x'), Soon()),
            absl::OkStatus());
  EXPECT_EQ(other.Get("big", Soon())->size(), kMaxValueBytes);
  std::thread waiter([&] { EXPECT_EQ(*leaf.Get("late", Soon()), "value"); });
  EXPECT_EQ(ranks[2]->store().Set("late", "value", Soon()), absl::OkStatus());
  waiter.join();
  const absl::Status late =
      leaf.Get("never", In(absl::Milliseconds(20))).status();
  EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(late.message()),
              AllOf(HasSubstr(absl::StrCat(port_)),
                    HasSubstr("through rank 2 gave no answer")));
  // Ranks 0 and 1, and those who relay.
  EXPECT_EQ(ConnectionsAt(port_), 4);

  JoinAll(ranks);
  const auto answers = ranks[5]->membership().Ask("where", Soon());
  ASSERT_EQ(answers.size(), 6);
  for (int rank = 0; rank < 6; ++rank) {
    EXPECT_EQ(answers[rank], absl::StrCat("where ", rank));
  }
  // Longer than the bound: who has nothing to say is still there.
  env->SleepUntil(In(kBound + kBound / 2));
  for (const auto& rank : ranks) EXPECT_FALSE(rank->heard());
}

TEST_F(TcpRelayTest, FewRanksNeedNoRelay) {
  Serve(/*fan_out=*/0);
  const auto ranks = ConnectAll({0, 1, 2, 3, 4}, 5);
  EXPECT_EQ(ranks[0]->store().Set("key", "", Soon()), absl::OkStatus());
  EXPECT_EQ(ConnectionsAt(port_), 5);
}

TEST(ControlFanOutTest, IsTheOptionOrTheRootOfTheWorldSize) {
  LaunchInfo launch;
  WorldOptions options;
  EXPECT_EQ(*ControlFanOut(launch, options, 128), 0);
  EXPECT_EQ(*ControlFanOut(launch, options, 129), 128);
  EXPECT_EQ(*ControlFanOut(launch, options, 1 << 20), 1024);
  options.control_fan_out = 0;
  EXPECT_EQ(*ControlFanOut(launch, options, 1 << 20), 0);
  launch.control_fan_out = 2;
  EXPECT_EQ(*ControlFanOut(launch, options, 4), 2);
  EXPECT_EQ(*ControlFanOut(launch, options, 5), 3);
  launch.control_fan_out.reset();
  options.control_fan_out = -1;
  EXPECT_EQ(ControlFanOut(launch, options, 4).status().code(),
            absl::StatusCode::kInvalidArgument);
}

// --- Deaths ---

TEST_F(TcpRelayTest, TheDeathOfALeafIsToldToAll) {
  Serve(/*fan_out=*/2);
  const auto ranks = ConnectAll({0, 1, 2, 4, 5}, 6);
  Socket leaf = Raw(PortFor(3));
  EXPECT_EQ(Greet(leaf, 3).role, StoreRole::kClient);
  Say(leaf, JoinFrame(3, 6));
  JoinAll(ranks);
  leaf.Close();
  for (const auto& rank : ranks) {
    EXPECT_EQ(rank->Verdict(),
              "UNAVAILABLE: rank 3 died (its connection to rank 2 closed)");
  }
}

TEST_F(TcpRelayTest, ALeafThatIsSilentIsToldToAllAndToItself) {
  Serve(/*fan_out=*/2, kBound);
  const auto ranks = ConnectAll({0, 1, 2, 4, 5}, 6);
  Socket leaf = Raw(PortFor(3));
  EXPECT_EQ(Greet(leaf, 3).role, StoreRole::kClient);
  Say(leaf, JoinFrame(3, 6));
  JoinAll(ranks);
  for (const auto& rank : ranks) {
    EXPECT_THAT(rank->Verdict(),
                HasSubstr("UNAVAILABLE: rank 3 does not answer for 2s"));
  }
  EXPECT_THAT(ReadKind(leaf, FrameKind::kFailed),
              HasSubstr("rank 3 does not answer for 2s"));
}

// A relay that is the test's own: its clients are its channels.
TEST_F(TcpRelayTest, TheDeathOfARelayIsNotThatOfItsClients) {
  Serve(/*fan_out=*/2);
  const auto ranks = ConnectAll({0, 1, 4, 5}, 6);
  Socket relay = BeRelay(2);
  Say(relay, Open(7, 3) + Open(8, 2) + PassFrame(7, JoinFrame(3, 6)) +
                 PassFrame(8, JoinFrame(2, 6)));
  JoinAll(ranks);
  relay.Close();
  for (const auto& rank : ranks) {
    EXPECT_EQ(rank->Verdict(),
              "UNAVAILABLE: rank 2 died (its connection to rank 0 closed)");
  }
}

// The others do not wait for those whom it served.
TEST_F(TcpRelayTest, TheDeathOfARelayEndsTheWaitForItsClients) {
  Serve(/*fan_out=*/2);
  const auto ranks = ConnectAll({0}, 6);
  Socket relay = BeRelay(2);
  Say(relay, Open(7, 3) + PassFrame(7, JoinFrame(3, 6)));
  std::thread waiter([&] {
    EXPECT_EQ(ranks[0]->Join().ToString(),
              "UNAVAILABLE: rank 2 died (its connection to rank 0 closed)");
  });
  // What came before it is known.
  Say(relay, FrameWriter(FrameKind::kBeat, 5).Finish());
  EXPECT_EQ(IdOf(ReadKind(relay, FrameKind::kReply)), 5);
  relay.Close();
  waiter.join();
}

TEST_F(TcpRelayTest, ARelayThatIsSilentIsNamed) {
  Serve(/*fan_out=*/2, kBound);
  const auto ranks = ConnectAll({0, 1, 4, 5}, 6);
  Socket relay = BeRelay(2);
  Say(relay, Open(7, 3) + Open(8, 2) + PassFrame(7, JoinFrame(3, 6)) +
                 PassFrame(8, JoinFrame(2, 6)));
  JoinAll(ranks);
  for (const auto& rank : ranks) {
    EXPECT_THAT(rank->Verdict(),
                HasSubstr("UNAVAILABLE: rank 2 does not answer for 2s"));
  }
  // Should it go on, its own rank and the other hear of it.
  for (int told = 0; told < 2 && !HasFailure();) {
    told += absl::StrContains(ReadKind(relay, FrameKind::kPass),
                              "rank 2 does not answer for 2s");
  }
}

// What its clients find themselves.
class ClientOfTheTestsRelayTest : public TcpRelayTest {
 protected:
  // Rank 3, a member of a group of one, served by the test as rank 2.
  void SetUp() override {
    Serve(/*fan_out=*/2);
    const Socket listener = *ListenAt(env, "127.0.0.1", 0, Soon());
    relay_ = Raw(port_);
    EXPECT_EQ(Greet(relay_, 2).role, StoreRole::kRelay);
    Say(relay_, FrameWriter(FrameKind::kServe, 0)
                    .Put(AddressText({"127.0.0.1", *listener.LocalPort()}))
                    .Finish());
    std::thread relaying([&] {
      client_ = AcceptAt(listener);
      ReadFrame(client_);
      Say(client_, WelcomeFrame(StoreRole::kClient, kBound));
      Say(client_, OkReplyTo(IdOf(ReadKind(client_, FrameKind::kJoin))));
    });
    absl::StatusOr<std::shared_ptr<Store>> store = Connect(3);
    EXPECT_TRUE(store.ok()) << store.status();
    if (store.ok()) {
      rank_ = std::make_unique<Rank>(*std::move(store), 0, 1);
      EXPECT_EQ(rank_->Join(), absl::OkStatus());
    }
    relaying.join();
    ASSERT_NE(rank_, nullptr);
  }

  Socket relay_;
  Socket client_;
  std::unique_ptr<Rank> rank_;
};

TEST_F(ClientOfTheTestsRelayTest, ItsEnd) {
  client_.Close();
  EXPECT_EQ(rank_->Verdict(),
            "UNAVAILABLE: rank 2 died (its connection to rank 3 closed)");
}

TEST_F(ClientOfTheTestsRelayTest, ItsSilence) {
  EXPECT_THAT(rank_->Verdict(),
              HasSubstr("UNAVAILABLE: rank 2 does not answer for 2s"));
  // For the relay to pass on, should it go on.
  EXPECT_THAT(ReadToEnd(client_), HasSubstr("rank 2 does not answer"));
}

TEST_F(ClientOfTheTestsRelayTest, TheEndOfRank0) {
  Say(client_, FrameWriter(FrameKind::kLost, 0)
                   .Put(absl::UnavailableError("rank 0 died (somehow)"))
                   .Finish());
  EXPECT_EQ(rank_->Verdict(), "UNAVAILABLE: rank 0 died (somehow)");
  EXPECT_EQ(rank_->store().Get("key", Soon()).status().ToString(),
            rank_->Verdict());
}

TEST_F(TcpRelayTest, TheEndOfTheServerIsPassedOn) {
  Serve(/*fan_out=*/2);
  const auto ranks = ConnectAll({0, 1, 2, 3, 4}, 5);
  JoinAll(ranks);
  server_.reset();
  const int at[] = {0, 1, 2, 2, 4};
  for (int rank = 0; rank < 5; ++rank) {
    EXPECT_EQ(ranks[rank]->Verdict(),
              absl::StrCat("UNAVAILABLE: rank 0 died (its connection to rank ",
                           at[rank], " closed)"));
  }
}

// A server that is the test's own.
TEST_F(TcpRelayTest, TheSilenceOfTheServerIsPassedOn) {
  const Socket listener = *ListenAt(env, "127.0.0.1", 0, Soon());
  port_ = *listener.LocalPort();
  Socket server;
  std::thread serving([&] {
    server = AcceptAt(listener);
    ReadFrame(server);
    Say(server, WelcomeFrame(StoreRole::kRelay, kBound));
    // It lets one in, and is stopped.
    const uint64_t channel = IdOf(ReadKind(server, FrameKind::kPass));
    Say(server, PassFrame(channel, OkReplyTo(/*request=*/1)));
  });
  absl::StatusOr<std::shared_ptr<Store>> store = Connect(2);
  ASSERT_TRUE(store.ok()) << store.status();
  Rank rank(*std::move(store), 0, 1);
  EXPECT_EQ(rank.Join(), absl::OkStatus());
  serving.join();
  EXPECT_THAT(rank.Verdict(),
              HasSubstr("UNAVAILABLE: rank 0 does not answer for 2s"));
  // What it finds when it goes on.
  EXPECT_EQ(KindOf(ReadKind(server, FrameKind::kFailAll)), FrameKind::kFailAll);
}

TEST_F(TcpRelayTest, AfterItsSilenceTheServerHearsThatItWasGivenUp) {
  Serve(/*fan_out=*/2);
  const auto ranks = ConnectAll({0, 1}, 4);
  Socket relay = BeRelay(2);
  Say(relay, Open(7, 3) + Open(8, 2) + PassFrame(7, JoinFrame(3, 4)) +
                 PassFrame(8, JoinFrame(2, 4)));
  JoinAll(ranks);
  const absl::Status verdict =
      absl::UnavailableError("rank 0 does not answer for 7s");
  Say(relay, FrameWriter(FrameKind::kFailAll, 0).Put(verdict).Finish());
  relay.Close();
  for (const auto& rank : ranks) EXPECT_EQ(rank->Verdict(), verdict.ToString());
}

// --- Ends that are no deaths ---

TEST_F(TcpRelayTest, WhenAllHaveLeftNobodysEndIsADeath) {
  Serve(/*fan_out=*/2);
  for (int round = 0; round < 20; ++round) {
    const auto ranks = ConnectAll({0, 1, 2, 3, 4, 5}, 6);
    JoinAll(ranks);
    std::vector<std::thread> threads;
    for (const auto& rank : ranks) {
      threads.emplace_back([&rank] {
        EXPECT_EQ(rank->membership().Leave(Soon()), absl::OkStatus());
        rank->End();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

// Whoever aborts, and goes at once, the others hear why.
TEST_F(TcpRelayTest, TheReasonOfAnAbortReachesAll) {
  for (int aborting = 0; aborting < 6; ++aborting) {
    Serve(/*fan_out=*/2);
    const auto ranks = ConnectAll({0, 1, 2, 3, 4, 5}, 6);
    JoinAll(ranks);
    ranks[aborting]->membership().Fail(absl::AbortedError("enough"));
    ranks[aborting]->End();
    for (int rank = 0; rank < 6; ++rank) {
      if (rank == aborting) continue;
      EXPECT_EQ(ranks[rank]->Verdict(), "ABORTED: enough")
          << "rank " << rank << ", after " << aborting;
    }
  }
}

// --- Relays that are not there ---

TEST_F(TcpRelayTest, WithoutTheRelayItsClientsConnectAndItAloneIsNamed) {
  Serve(/*fan_out=*/2);
  const auto ranks = ConnectAll({0, 1}, 4);
  absl::StatusOr<std::shared_ptr<Store>> store =
      ConnectTcpStore(env, ClientOf(3), In(absl::Seconds(1)));
  ASSERT_TRUE(store.ok()) << store.status();
  Rank leaf(*std::move(store), 3, 4);
  const absl::Time deadline = In(absl::Milliseconds(300));
  std::vector<std::thread> threads;
  for (Rank* rank : {ranks[0].get(), ranks[1].get(), &leaf}) {
    threads.emplace_back([&, rank] {
      EXPECT_THAT(rank->Join(deadline).ToString(),
                  HasSubstr(": rank 2 of 4 did not connect"));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// It said where it serves, and is gone or stopped before a client comes.
TEST_F(TcpRelayTest, ARelayThatDoesNotAnswerIsDoneWithout) {
  Serve(/*fan_out=*/2);
  for (const bool stopped : {false, true}) {
    Socket listener = *ListenAt(env, "127.0.0.1", 0, Soon());
    Socket relay = Raw(port_);
    EXPECT_EQ(Greet(relay, 2).role, StoreRole::kRelay);
    Say(relay, FrameWriter(FrameKind::kServe, 0)
                   .Put(AddressText({"127.0.0.1", *listener.LocalPort()}))
                   .Finish());
    if (!stopped) listener.Close();
    absl::StatusOr<std::shared_ptr<Store>> store =
        ConnectTcpStore(env, ClientOf(3), In(absl::Seconds(1)));
    ASSERT_TRUE(store.ok()) << store.status();
    EXPECT_EQ((*store)->Set("key", "", Soon()), absl::OkStatus());
  }
}

TEST_F(TcpRelayTest, AClientWaitsForItsRelay) {
  Serve(/*fan_out=*/2);
  std::thread leaf([&] {
    const absl::StatusOr<std::shared_ptr<Store>> store = Connect(3);
    ASSERT_TRUE(store.ok()) << store.status();
    EXPECT_EQ((*store)->Set("here", "", Soon()), absl::OkStatus());
  });
  const absl::StatusOr<std::shared_ptr<Store>> relay = Connect(2);
  ASSERT_TRUE(relay.ok()) << relay.status();
  EXPECT_EQ(*(*relay)->Get("here", Soon()), "");
  EXPECT_EQ(ConnectionsAt(port_), 1);
  leaf.join();
}

// --- What is not understood ---

TEST_F(TcpRelayTest, GarbageOfAClientEndsItOnly) {
  Serve(/*fan_out=*/2);
  const auto ranks = ConnectAll({0, 2, 3}, 4);
  const int port = PortFor(3);
  const std::string cases[] = {
      "GET / HTTP/1.1\r\n\r\n",
      std::string("\xff\xff\xff\xff\x01", 5),
      HelloFrame(3) + std::string("\xff\xff\xff\xff\x01", 5),
      HelloFrame(3) + HelloFrame(3),
      HelloFrame(3) + FrameWriter(static_cast<FrameKind>(99), 1).Finish(),
      HelloFrame(3) + FrameWriter(FrameKind::kSet, 1).Finish(),
      HelloFrame(3) + Open(1, 3),
      HelloFrame(3) + PassFrame(1, JoinFrame(3, 4)),
      HelloFrame(3) + FrameWriter(FrameKind::kClose, 1).Finish(),
      HelloFrame(3) + FrameWriter(FrameKind::kLost, 1).Finish(),
  };
  for (const std::string& bytes : cases) {
    Socket socket = Raw(port);
    Say(socket, bytes);
    ReadToEnd(socket);
  }
  for (const auto& rank : ranks) {
    EXPECT_EQ(rank->store().Set("k", "v", Soon()), absl::OkStatus());
  }
}

TEST_F(TcpRelayTest, GarbageOfARelayEndsIt) {
  Serve(/*fan_out=*/2);
  const auto ranks = ConnectAll({0}, 4);
  const std::string cases[] = {
      FrameWriter(static_cast<FrameKind>(99), 1).Finish(),
      FrameWriter(FrameKind::kServe, 1).Finish(),
      FrameWriter(FrameKind::kOpen, 1).Finish(),
      Open(1, 3) + Open(1, 3),
      FrameWriter(FrameKind::kPass, 1).Finish(),
      FrameWriter(FrameKind::kSilent, 1).Finish(),
      FrameWriter(FrameKind::kFailAll, 1).Finish(),
      JoinFrame(2, 4),
      std::string("\xff\xff\xff\xff\x01", 5),
  };
  for (const std::string& bytes : cases) {
    Socket relay = Raw(port_);
    EXPECT_EQ(Greet(relay, 2).role, StoreRole::kRelay);
    Say(relay, bytes);
    ReadToEnd(relay);
  }
  // Channels that are not there are none; one whose client says what is not
  // understood is closed.
  Socket relay = BeRelay(2);
  Say(relay, PassFrame(9, JoinFrame(3, 4)) +
                 FrameWriter(FrameKind::kClose, 9).Finish() +
                 FrameWriter(FrameKind::kSilent, 9)
                     .Put(absl::string_view("sleeps"))
                     .Finish() +
                 Open(1, 3) + PassFrame(1, PassFrame(1, JoinFrame(3, 4))));
  EXPECT_EQ(IdOf(ReadKind(relay, FrameKind::kClose)), 1);
  EXPECT_EQ(ranks[0]->store().Set("k", "v", Soon()), absl::OkStatus());
}

// --- Tokens ---

TEST_F(TcpRelayTest, ARelayAsksForTheToken) {
  Serve(/*fan_out=*/2, kBound, kToken);
  const auto ranks = ConnectAll({0, 2, 3}, 4);
  ASSERT_EQ(ranks.size(), 3);
  EXPECT_EQ(ranks[2]->store().Set("k", "v", Soon()), absl::OkStatus());
  const int port = PortFor(3);
  TcpStoreOptions stranger;
  stranger.port = port;
  stranger.job_id = "job";
  for (const char* token : {"", "another token of 16"}) {
    stranger.token = token;
    EXPECT_EQ(ConnectTcpStore(env, stranger, Soon()).status().code(),
              absl::StatusCode::kPermissionDenied);
  }
  const std::string set = FrameWriter(FrameKind::kSet, 1)
                              .Put(absl::string_view("stranger"))
                              .Put(absl::string_view("was here"))
                              .Finish();
  const std::string proof = FrameWriter(FrameKind::kProof, 0)
                                .Put(absl::string_view(std::string(32, 'x')))
                                .Finish();
  for (const std::string& bytes :
       {set, proof, HelloFrame(3) + set, HelloFrame(3) + proof + set}) {
    Socket socket = Raw(port);
    Say(socket, bytes);
    ReadToEnd(socket);
  }
  // Of many that say nothing few are kept.
  std::vector<Socket> silent;
  for (int i = 0; i < 300; ++i) silent.push_back(Raw(port));
  ReadToEnd(silent[0]);
  EXPECT_EQ(ranks[2]
                ->store()
                .Get("stranger", In(absl::Milliseconds(20)))
                .status()
                .code(),
            absl::StatusCode::kDeadlineExceeded);
  stranger.token = kToken;
  EXPECT_TRUE(ConnectTcpStore(env, stranger, Soon()).ok());
}

// --- Many ---

TEST_F(TcpRelayTest, ManyRanksMeetAnswerAndHearOfADeath) {
  constexpr int kRanks = 300;
  constexpr int kDead = 77;
  rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  LaunchInfo launch;
  launch.control_fan_out = 2;
  const int fan_out = *ControlFanOut(launch, {}, kRanks);
  EXPECT_EQ(fan_out, 18);
  Serve(fan_out);
  ASSERT_FALSE(HasFailure());
  std::vector<int> numbers;
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank != kDead) numbers.push_back(rank);
  }
  const auto ranks = ConnectAll(numbers, kRanks);
  ASSERT_EQ(ranks.size(), kRanks - 1);
  Socket leaf = Raw(PortFor(kDead));
  EXPECT_EQ(Greet(leaf, kDead).role, StoreRole::kClient);
  Say(leaf, JoinFrame(kDead, kRanks));
  JoinAll(ranks);
  EXPECT_EQ(ranks[0]->store().Set("key", "", Soon()), absl::OkStatus());
  const int relays = (kRanks - 1) / fan_out;
  EXPECT_EQ(ConnectionsAt(port_), fan_out + relays);

  std::thread answering([&] {
    const uint64_t question = IdOf(ReadKind(leaf, FrameKind::kQuestion));
    Say(leaf, FrameWriter(FrameKind::kAnswer, question)
                  .Put(absl::string_view("? 77"))
                  .Finish());
  });
  const auto answers = ranks[kRanks - 2]->membership().Ask("?", Soon());
  answering.join();
  ASSERT_EQ(answers.size(), kRanks);
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(answers[rank], absl::StrCat("? ", rank));
  }
  leaf.Close();
  for (const auto& rank : ranks) {
    EXPECT_EQ(rank->Verdict(),
              "UNAVAILABLE: rank 77 died (its connection to rank 72 closed)");
  }
}

}  // namespace
}  // namespace dsd
