// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/tcp_store.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/base/version.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store_frames.h"
#include "dsd/core/comm/store_protocol.h"
#include "dsd/testing/harness/no_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

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

std::string TextOf(const absl::Status& status) {
  return std::string(status.message());
}

class TcpStoreTest : public ::testing::Test {
 protected:
  TcpStoreTest() {
    TcpStoreServerOptions options;
    options.job_id = "job";
    options.last_group = "last";
    absl::StatusOr<std::unique_ptr<TcpStoreServer>> started =
        TcpStoreServer::Start(env, options, Soon());
    EXPECT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
    port_ = server_->port();
  }

  std::shared_ptr<Store> Connect(int rank = 0) {
    TcpStoreOptions options;
    options.port = port_;
    options.job_id = "job";
    options.rank = rank;
    absl::StatusOr<std::shared_ptr<Store>> store =
        ConnectTcpStore(env, options, Soon());
    EXPECT_TRUE(store.ok()) << store.status();
    return *std::move(store);
  }

  // A connection that says what it likes.
  Socket Raw() {
    absl::StatusOr<Socket> socket = ConnectTo(env, "127.0.0.1", port_, Soon());
    EXPECT_TRUE(socket.ok()) << socket.status();
    return *std::move(socket);
  }

  std::unique_ptr<TcpStoreServer> server_;
  int port_ = 0;
};

MemberOptions Member(int rank, int size, absl::string_view group = "g") {
  MemberOptions options;
  options.group = std::string(group);
  options.rank = rank;
  options.size = size;
  options.on_failure = [](const absl::Status&) {};
  return options;
}

TEST_F(TcpStoreTest, KeysAndCounters) {
  const auto a = Connect();
  const auto b = Connect();
  EXPECT_EQ(a->server_host(), "127.0.0.1");
  EXPECT_EQ(a->Set("key", std::string("a\0b", 3), Soon()), absl::OkStatus());
  EXPECT_EQ(*b->Get("key", Soon()), std::string("a\0b", 3));
  EXPECT_EQ(a->Set("key", "", Soon()), absl::OkStatus());
  EXPECT_EQ(*b->Get("key", Soon()), "");
  EXPECT_EQ(*a->Add("n", 5, Soon()), 5);
  EXPECT_EQ(*b->Add("n", -7, Soon()), -2);
  EXPECT_EQ(*b->Get("n", Soon()), "-2");
  EXPECT_EQ(a->Set("n", "-9223372036854775808", Soon()), absl::OkStatus());
  EXPECT_EQ(a->Add("n", -1, Soon()).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(a->Set("n", "word", Soon()), absl::OkStatus());
  EXPECT_EQ(a->Add("n", 1, Soon()).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(a->Set("big", std::string(kMaxValueBytes, 'x'), Soon()),
            absl::OkStatus());
  EXPECT_EQ(b->Get("big", Soon())->size(), kMaxValueBytes);
  EXPECT_EQ(a->Set("big", std::string(kMaxValueBytes + 1, 'x'), Soon()).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(a->Set(std::string(kMaxKeyBytes + 1, 'k'), "", Soon()).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(TcpStoreTest, AWaitEndsWhenTheKeyComes) {
  const auto a = Connect();
  const auto b = Connect();
  std::thread waiter([&] { EXPECT_EQ(*b->Get("late", Soon()), "value"); });
  EXPECT_EQ(a->Set("late", "value", Soon()), absl::OkStatus());
  waiter.join();
}

TEST_F(TcpStoreTest, AWaitEndsAtItsDeadlineAndHarmsNothing) {
  const auto a = Connect();
  const absl::Status status =
      a->Get("never", In(absl::Milliseconds(20))).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(TextOf(status),
              AllOf(HasSubstr("\"never\""), HasSubstr(absl::StrCat(port_))));
  // The late value answers nobody.
  EXPECT_EQ(a->Set("never", "x", Soon()), absl::OkStatus());
  EXPECT_EQ(*a->Get("never", Soon()), "x");
}

TEST_F(TcpStoreTest, MembersHearOfADeath) {
  const auto a = Connect(0);
  auto b = Connect(1);
  absl::Notification heard;
  absl::Status verdict;
  MemberOptions options = Member(0, 2);
  options.on_failure = [&](const absl::Status& status) {
    verdict = status;
    heard.Notify();
  };
  std::unique_ptr<Membership> mine;
  std::thread joining([&] { mine = *a->Join(options, Soon()); });
  auto other = *b->Join(Member(1, 2), Soon());
  joining.join();
  // The process of rank 1 is gone without a word: its connection just closes.
  const std::shared_ptr<Store> keep = b;
  other.reset();
  heard.WaitForNotification();
  EXPECT_EQ(verdict.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(TextOf(verdict), HasSubstr("rank 1 left the group"));
}

TEST_F(TcpStoreTest, WhoWaitsForOthersHearsOfADeathSoon) {
  Socket waiting = Raw();
  const std::string set = FrameWriter(FrameKind::kSet, 2)
                              .Put(absl::string_view("k"))
                              .Put(absl::string_view("v"))
                              .Finish();
  ASSERT_EQ(
      waiting.WriteAll(env, HelloFrame(0) + JoinFrame(0, 3) + set, Soon()),
      absl::OkStatus());
  ReadFrame(waiting);  // the welcome
  ReadFrame(waiting);  // of the key: it has joined
  {
    Socket dying = Raw();
    ASSERT_EQ(
        dying.WriteAll(env, HelloFrame(1) + JoinFrame(1, 3) + set, Soon()),
        absl::OkStatus());
    ReadFrame(dying);
    ReadFrame(dying);
  }
  EXPECT_THAT(ReadFrame(waiting), AllOf(HasSubstr("rank 1 died"),
                                        HasSubstr("before all had connected")));
}

// Takes all descriptors of the process but `left`, as long as it lives.
class FewDescriptors {
 public:
  explicit FewDescriptors(int left) {
    EXPECT_EQ(getrlimit(RLIMIT_NOFILE, &before_), 0);
    rlimit few = before_;
    few.rlim_cur = std::min<rlim_t>(before_.rlim_cur, 256);
    EXPECT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
    do {
      fillers_.emplace_back(eventfd(0, EFD_CLOEXEC));
    } while (fillers_.back().valid());
    fillers_.resize(fillers_.size() - 1 - left);
  }
  ~FewDescriptors() {
    fillers_.clear();
    EXPECT_EQ(setrlimit(RLIMIT_NOFILE, &before_), 0);
  }

 private:
  rlimit before_;
  std::vector<Socket> fillers_;
};

TEST_F(TcpStoreTest, WithoutDescriptorsConnectingSaysSo) {
  TcpStoreOptions options;
  options.port = port_;
  options.job_id = "job";
  absl::Status status;
  {
    const FewDescriptors few(0);
    status = ConnectTcpStore(env, options, Soon()).status();
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
}

// The server has none for one more rank: that one hears so, and those who wait
// for it, too.
TEST_F(TcpStoreTest, AServerWithoutDescriptorsSaysSo) {
  const auto member = Connect();
  const absl::Time join_end = In(absl::Seconds(2));
  absl::Status joined;
  std::thread joining(
      [&] { joined = member->Join(Member(0, 2), join_end).status(); });
  absl::Status status;
  {
    const FewDescriptors few(1);  // for the client's end
    TcpStoreOptions options;
    options.port = port_;
    options.job_id = "job";
    options.rank = 1;
    status = ConnectTcpStore(env, options, join_end + absl::Milliseconds(500))
                 .status();
    joining.join();
  }
  for (const absl::Status& one : {status, joined}) {
    EXPECT_EQ(one.code(), absl::StatusCode::kResourceExhausted) << one;
    EXPECT_THAT(TextOf(one),
                HasSubstr("rank 0 cannot let ranks in: accept: Too "
                          "many open files; raise ulimit -n"));
  }
  EXPECT_THAT(TextOf(joined), HasSubstr("rank 1 of 2 did not connect within"));
}

TEST_F(TcpStoreTest, AServerThatHasDescriptorsAgainLetsRanksIn) {
  auto few = std::make_unique<FewDescriptors>(1);
  Socket first = Raw();
  EXPECT_EQ(first.WriteAll(env, HelloFrame(1), Soon()), absl::OkStatus());
  EXPECT_THAT(ReadFrame(first), HasSubstr("cannot let ranks in"));
  few.reset();
  EXPECT_EQ(Connect(1)->Set("key", "", Soon()), absl::OkStatus());
}

TEST_F(TcpStoreTest, WithoutThreadsItSaysSo) {
  TcpStoreOptions client;
  client.port = port_;
  client.job_id = "job";
  const NoThreads none;
  for (const absl::Status& status :
       {TcpStoreServer::Start(env, {}, Soon()).status(),
        ConnectTcpStore(env, client, Soon()).status(),
        // Which a thread looks for.
        ConnectOnce(env, "host.invalid", port_, Soon()).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_THAT(TextOf(status), HasSubstr("cannot start thread dsd_"));
  }
}

TEST_F(TcpStoreTest, MembersHearOfTheServersEnd) {
  const auto a = Connect(3);
  absl::Notification heard;
  absl::Status verdict;
  MemberOptions options = Member(0, 1);
  options.on_failure = [&](const absl::Status& status) {
    verdict = status;
    heard.Notify();
  };
  const auto mine = *a->Join(options, Soon());
  server_.reset();
  heard.WaitForNotification();
  EXPECT_EQ(verdict, absl::UnavailableError(
                         "rank 0 died (its connection to rank 3 closed)"));
  EXPECT_EQ(a->Get("key", Soon()).status(), verdict);
  EXPECT_EQ(a->Set("key", "", Soon()), verdict);
}

TEST_F(TcpStoreTest, QuestionsAreAnsweredByThoseWhoCan) {
  const auto a = Connect(0);
  const auto b = Connect(1);
  MemberOptions first = Member(0, 2);
  first.on_question = [](absl::string_view question) {
    return absl::StrCat(question, "?");
  };
  std::unique_ptr<Membership> mine;
  std::thread joining([&] { mine = *a->Join(first, Soon()); });
  MemberOptions second = Member(1, 2);
  absl::Notification release;
  second.on_question = [&](absl::string_view) {
    release.WaitForNotification();
    return std::string();
  };
  const auto other = *b->Join(second, Soon());
  joining.join();
  const auto answers = mine->Ask("where", In(absl::Milliseconds(100)));
  release.Notify();
  ASSERT_EQ(answers.size(), 2);
  EXPECT_EQ(answers[0], "where?");
  EXPECT_EQ(answers[1], std::nullopt);
  EXPECT_EQ(*mine->Ask("again", Soon())[1], "");
}

// A thousand ranks whose time is over do not make a million questions.
TEST_F(TcpStoreTest, WhatManyAskAtOnceIsAskedOnce) {
  const auto ask = [](uint64_t request, absl::string_view text) {
    return FrameWriter(FrameKind::kAsk, request)
        .Put(uint64_t{1})
        .Put(text)
        .Put(absl::ToInt64Nanoseconds(absl::Minutes(1)))
        .Finish();
  };
  const auto head_of = [](absl::string_view frame) {
    uint64_t id = 0;
    EXPECT_GE(frame.size(), 1 + sizeof(id));
    std::memcpy(&id, frame.data() + 1, sizeof(id));
    return std::pair(static_cast<FrameKind>(frame[0]), id);
  };
  Socket socket = Raw();
  ASSERT_EQ(socket.WriteAll(env,
                            HelloFrame(0) + JoinFrame(0, 1) + ask(2, "where") +
                                ask(3, "where") + ask(4, "else"),
                            Soon()),
            absl::OkStatus());
  ReadFrame(socket);  // of the hello
  ReadFrame(socket);  // of the join
  const auto where = head_of(ReadFrame(socket));
  const auto other = head_of(ReadFrame(socket));
  EXPECT_EQ(where.first, FrameKind::kQuestion);
  EXPECT_EQ(other.first, FrameKind::kQuestion);
  for (const uint64_t question : {where.second, other.second}) {
    ASSERT_EQ(socket.WriteAll(env,
                              FrameWriter(FrameKind::kAnswer, question)
                                  .Put(absl::string_view("here"))
                                  .Finish(),
                              Soon()),
              absl::OkStatus());
  }
  for (const uint64_t request : {2, 3, 4}) {
    const std::string reply = ReadFrame(socket);
    EXPECT_EQ(head_of(reply), std::pair(FrameKind::kReply, request));
    EXPECT_THAT(reply, HasSubstr("here"));
  }
  // What was answered is asked again.
  ASSERT_EQ(socket.WriteAll(env, ask(5, "where"), Soon()), absl::OkStatus());
  EXPECT_EQ(head_of(ReadFrame(socket)).first, FrameKind::kQuestion);
}

TEST_F(TcpStoreTest, WhenTheLastGroupHasGoneNobodyIsLetIn) {
  auto a = Connect();
  const auto mine = *a->Join(Member(0, 1, "last"), Soon());
  EXPECT_EQ(mine->Leave(Soon()), absl::OkStatus());
  EXPECT_EQ(ConnectTo(env, "127.0.0.1", port_, In(absl::Milliseconds(50)))
                .status()
                .code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(a->Set("still", "there", Soon()), absl::OkStatus());
}

TEST_F(TcpStoreTest, ClientsOfAnotherJobAreRefused) {
  TcpStoreOptions options;
  options.port = port_;
  options.job_id = "other";
  const absl::Status status = ConnectTcpStore(env, options, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(TextOf(status),
              AllOf(HasSubstr("\"job\""), HasSubstr("\"other\""),
                    HasSubstr("MASTER_PORT")));
}

TEST_F(TcpStoreTest, ClientsOfAnotherVersionAreRefusedByName) {
  Socket socket = Raw();
  ASSERT_EQ(socket.WriteAll(env,
                            FrameWriter(FrameKind::kHello, 0)
                                .Put(kStoreMagic)
                                .Put(kStoreVersion + 41)
                                .Put(absl::string_view("what comes then"))
                                .Finish(),
                            Soon()),
            absl::OkStatus());
  EXPECT_THAT(ReadFrame(socket),
              AllOf(HasSubstr(absl::StrCat("version ", kStoreVersion)),
                    HasSubstr(absl::StrCat("version ", kStoreVersion + 41))));
  EXPECT_FALSE(socket.ReadExactly(env, 1, Soon()).ok());

  // The same protocol, but perhaps other plans.
  Socket other = Raw();
  ASSERT_EQ(other.WriteAll(env, HelloFrame(-1, "99.1"), Soon()),
            absl::OkStatus());
  EXPECT_THAT(ReadToEnd(other),
              AllOf(HasSubstr(absl::StrCat("of dsd ", kLibraryVersion)),
                    HasSubstr("of dsd 99.1")));
}

// Whatever comes in, the connection is closed and the store serves on.
TEST_F(TcpStoreTest, GarbageEndsTheConnectionOnly) {
  const auto client = Connect();
  const std::string hello = HelloFrame();
  const auto after_hello = [&](std::string frame) { return hello + frame; };
  const std::string cases[] = {
      "GET / HTTP/1.1\r\n\r\n",
      std::string(100, '\xff'),
      std::string(4, '\0'),
      // A length of 4 GiB, and one just too long for a hello.
      std::string("\xff\xff\xff\xff\x01", 5),
      std::string("\x01\x10\x00\x00\x01", 5),
      // No hello first.
      FrameWriter(FrameKind::kSet, 1)
          .Put(absl::string_view("k"))
          .Put(absl::string_view("v"))
          .Finish(),
      FrameWriter(FrameKind::kHello, 0).Put(uint32_t{1}).Finish(),
      after_hello(hello),
      after_hello(FrameWriter(static_cast<FrameKind>(99), 1).Finish()),
      after_hello(FrameWriter(FrameKind::kSet, 1).Finish()),
      // A text that says it is longer than the frame.
      after_hello(FrameWriter(FrameKind::kGet, 1).Put(uint32_t{1000}).Finish()),
      after_hello(FrameWriter(FrameKind::kJoin, 1)
                      .Put(absl::string_view("g"))
                      .Finish()),
      after_hello(FrameWriter(FrameKind::kAnswer, 7).Finish()),
      after_hello(FrameWriter(FrameKind::kFailAll, 1).Finish()),
      // What only those may say who relay.
      after_hello(FrameWriter(FrameKind::kServe, 0)
                      .Put(absl::string_view("1 127.0.0.1"))
                      .Finish()),
      after_hello(FrameWriter(FrameKind::kOpen, 1).Put(int32_t{3}).Finish()),
      after_hello(PassFrame(1, JoinFrame(3, 4))),
      after_hello(FrameWriter(FrameKind::kClose, 1).Finish()),
  };
  for (const std::string& bytes : cases) {
    Socket socket = Raw();
    ASSERT_EQ(socket.WriteAll(env, bytes, Soon()), absl::OkStatus());
    ReadToEnd(socket);
  }
  // Names of things that are not there are no garbage.
  Socket socket = Raw();
  ASSERT_EQ(
      socket.WriteAll(
          env,
          after_hello(
              FrameWriter(FrameKind::kGone, 1).Put(uint64_t{5}).Finish() +
              FrameWriter(FrameKind::kForget, 9).Finish() +
              FrameWriter(FrameKind::kLeave, 2).Put(uint64_t{5}).Finish()),
          Soon()),
      absl::OkStatus());
  EXPECT_TRUE(socket.ReadExactly(env, 10, Soon()).ok());
  EXPECT_EQ(client->Set("k", "v", Soon()), absl::OkStatus());
}

// Stands for a process that is stopped: connected, and silent.
TEST(TcpStoreBeatTest, AClientThatGivesNoSignOfLifeIsGivenUp) {
  TcpStoreServerOptions options;
  options.job_id = "job";
  options.heartbeat_bound = absl::Seconds(2);
  const auto server = *TcpStoreServer::Start(env, options, Soon());
  TcpStoreOptions client;
  client.port = server->port();
  client.job_id = "job";
  const auto a = *ConnectTcpStore(env, client, Soon());
  Socket silent = *ConnectTo(env, "127.0.0.1", server->port(), Soon());
  ASSERT_EQ(silent.WriteAll(env, HelloFrame() + JoinFrame(1, 2), Soon()),
            absl::OkStatus());
  absl::Notification heard;
  absl::Status verdict;
  MemberOptions member = Member(0, 2);
  member.on_failure = [&](const absl::Status& status) {
    verdict = status;
    heard.Notify();
  };
  const auto mine = *a->Join(member, Soon());
  heard.WaitForNotification();
  EXPECT_EQ(verdict.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(TextOf(verdict), HasSubstr("rank 1 does not answer for 2s"));
  // Those who give signs go on, however long they have nothing to say.
  EXPECT_EQ(a->Set("key", "", Soon()), absl::OkStatus());
}

TEST(TcpStoreBeatTest, AServerThatGivesNoSignOfLifeIsGivenUp) {
  const Socket listener = *ListenAt(env, "127.0.0.1", 0, Soon());
  Socket silent;
  std::thread server([&] {
    pollfd poll = {listener.fd(), POLLIN, 0};
    ASSERT_EQ(*env->Poll(absl::MakeSpan(&poll, 1), Soon()), 1);
    silent = *AcceptFrom(listener);
    // It greets, lets one in, and is stopped.
    ReadFrame(silent);
    ASSERT_EQ(
        silent.WriteAll(env, WelcomeFrame(StoreRole::kClient, absl::Seconds(2)),
                        Soon()),
        absl::OkStatus());
    while (ReadFrame(silent)[0] != static_cast<char>(FrameKind::kJoin)) {
    }
    ASSERT_EQ(silent.WriteAll(env, OkReplyTo(1), Soon()), absl::OkStatus());
  });
  TcpStoreOptions options;
  options.port = *listener.LocalPort();
  options.rank = 3;
  const auto client = *ConnectTcpStore(env, options, Soon());
  absl::Notification heard;
  absl::Status verdict;
  MemberOptions member = Member(0, 1);
  member.on_failure = [&](const absl::Status& status) {
    verdict = status;
    heard.Notify();
  };
  const auto mine = client->Join(member, Soon());
  ASSERT_TRUE(mine.ok()) << mine.status();
  server.join();
  heard.WaitForNotification();
  EXPECT_EQ(verdict.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(TextOf(verdict), HasSubstr("rank 0 does not answer for 2s"));
  EXPECT_EQ(client->Get("key", Soon()).status(), verdict);
  // What it finds when it goes on: why they have left, before their end.
  EXPECT_THAT(ReadToEnd(silent), HasSubstr("rank 0 does not answer"));
}

constexpr char kToken[] = "0123456789abcdef";

class TcpStoreTokenTest : public ::testing::Test {
 protected:
  TcpStoreTokenTest() {
    TcpStoreServerOptions options;
    options.job_id = "job";
    options.token = kToken;
    server_ = *TcpStoreServer::Start(env, options, Soon());
  }

  absl::StatusOr<std::shared_ptr<Store>> Connect(absl::string_view token) {
    TcpStoreOptions options;
    options.port = server_->port();
    options.job_id = "job";
    options.token = std::string(token);
    return ConnectTcpStore(env, options, Soon());
  }

  Socket Raw() { return *ConnectTo(env, "127.0.0.1", server_->port(), Soon()); }

  std::unique_ptr<TcpStoreServer> server_;
};

TEST_F(TcpStoreTokenTest, WhoKnowsItGetsIn) {
  const auto store = Connect(kToken);
  ASSERT_TRUE(store.ok()) << store.status();
  EXPECT_EQ((*store)->Set("k", "v", Soon()), absl::OkStatus());
  EXPECT_EQ(*(*store)->Get("k", Soon()), "v");
}

TEST_F(TcpStoreTokenTest, WhoDoesNotIsToldAndHarmsNothing) {
  const auto store = Connect(kToken);
  ASSERT_TRUE(store.ok()) << store.status();
  const absl::Status wrong = Connect("0123456789abcdeg").status();
  EXPECT_EQ(wrong.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(TextOf(wrong),
              AllOf(HasSubstr("is not that of the store"),
                    HasSubstr("DSD_TOKEN"), Not(HasSubstr("0123456789abcde"))));
  const absl::Status none = Connect("").status();
  EXPECT_EQ(none.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(TextOf(none), HasSubstr("this rank has none"));
  EXPECT_EQ((*store)->Set("k", "v", Soon()), absl::OkStatus());
}

TEST_F(TcpStoreTest, AServerThatAsksForNoTokenIsNotTrusted) {
  TcpStoreOptions options;
  options.port = port_;
  options.job_id = "job";
  options.token = kToken;
  const absl::Status status = ConnectTcpStore(env, options, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(TextOf(status), HasSubstr("the store does not ask for it"));
}

TEST(TcpStoreImpostorTest, AServerThatDoesNotKnowTheTokenIsNotTrusted) {
  const Socket listener = *ListenAt(env, "127.0.0.1", 0, Soon());
  std::thread server([&] {
    pollfd poll = {listener.fd(), POLLIN, 0};
    ASSERT_EQ(*env->Poll(absl::MakeSpan(&poll, 1), Soon()), 1);
    Socket socket = *AcceptFrom(listener);
    ReadFrame(socket);
    ASSERT_EQ(socket.WriteAll(env,
                              FrameWriter(FrameKind::kChallenge, 0)
                                  .Put(absl::string_view(NewNonce(env)))
                                  .Finish(),
                              Soon()),
              absl::OkStatus());
    // It sends the client's own proof back.
    const std::string proof = ReadFrame(socket).substr(1 + 8 + 4);
    ASSERT_EQ(
        socket.WriteAll(
            env, WelcomeFrame(StoreRole::kClient, absl::ZeroDuration(), proof),
            Soon()),
        absl::OkStatus());
    ReadToEnd(socket);
  });
  TcpStoreOptions options;
  options.port = *listener.LocalPort();
  options.token = kToken;
  const absl::Status status = ConnectTcpStore(env, options, Soon()).status();
  server.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(TextOf(status), HasSubstr("does not know the token"));
}

TEST_F(TcpStoreTokenTest, NothingIsDoneForThoseWhoHaveNotProvedIt) {
  const std::string set = FrameWriter(FrameKind::kSet, 1)
                              .Put(absl::string_view("k"))
                              .Put(absl::string_view("v"))
                              .Finish();
  const std::string proof = FrameWriter(FrameKind::kProof, 0)
                                .Put(absl::string_view(std::string(32, 'x')))
                                .Finish();
  for (const std::string& bytes :
       {proof, set, HelloFrame() + set, HelloFrame() + HelloFrame(),
        HelloFrame() + proof + set,
        HelloFrame() + FrameWriter(FrameKind::kProof, 0).Finish(),
        HelloFrame() + std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8)}) {
    Socket socket = Raw();
    ASSERT_EQ(socket.WriteAll(env, bytes, Soon()), absl::OkStatus());
    ReadToEnd(socket);
  }
  const auto store = Connect(kToken);
  ASSERT_TRUE(store.ok()) << store.status();
  EXPECT_EQ((*store)->Get("k", In(absl::Milliseconds(20))).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

// Of a thousand that connect and say nothing, or begin a greeting and do not
// end it, few are kept, none for long, and a client gets in meanwhile.
TEST(TcpStoreStrangersTest, TheirNumberAndTimeAreBounded) {
  TcpStoreServerOptions options;
  options.greeting_patience = absl::Seconds(3);
  const auto server = *TcpStoreServer::Start(env, options, Soon());
  std::vector<Socket> strangers;
  for (int i = 0; i < 600; ++i) {
    strangers.push_back(*ConnectTo(env, "127.0.0.1", server->port(), Soon()));
    if (i % 2 == 0) {
      ASSERT_EQ(
          strangers.back().WriteAll(env, HelloFrame().substr(0, 9), Soon()),
          absl::OkStatus());
    }
  }
  TcpStoreOptions client;
  client.port = server->port();
  const auto store = *ConnectTcpStore(env, client, Soon());
  EXPECT_EQ(store->Set("k", "v", Soon()), absl::OkStatus());
  // The oldest have gone at once, the others go at their time.
  for (Socket& stranger : strangers) EXPECT_EQ(ReadToEnd(stranger), "");
  EXPECT_EQ(*store->Get("k", Soon()), "v");
}

TEST_F(TcpStoreTest, APortInUseIsNamed) {
  TcpStoreServerOptions options;
  options.port = port_;
  const absl::Status status =
      TcpStoreServer::Start(env, options, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(TextOf(status), HasSubstr(absl::StrCat("127.0.0.1:", port_,
                                                     ": the port is in use")));
  // In the words of the environment, for those who set it.
  LaunchInfo launch;
  launch.world_size = 2;
  launch.master_port = port_;
  WorldOptions world;
  const BackendDescriptor none = {"none", kEngineApiVersion, true, false, false,
                                  nullptr};
  world.descriptor = &none;
  const absl::Status connected = ConnectWorld(launch, world).status();
  EXPECT_EQ(connected.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(
      TextOf(connected),
      AllOf(HasSubstr("rank 0 of 2"), HasSubstr("MASTER_ADDR 127.0.0.1"),
            HasSubstr(absl::StrCat("MASTER_PORT ", port_)),
            HasSubstr("in use")));
}

TEST_F(TcpStoreTest, AnAddressOfAnotherHostIsNamed) {
  TcpStoreServerOptions options;
  options.host = "192.0.2.1";  // for documentation; nobody's
  const absl::Status status =
      TcpStoreServer::Start(env, options, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(TextOf(status), HasSubstr("does not have that address"));
}

TEST(TcpStoreConnectTest, NobodyAnswers) {
  absl::StatusOr<Socket> listener = ListenAt(env, "127.0.0.1", 0, Soon());
  ASSERT_TRUE(listener.ok());
  TcpStoreOptions options;
  options.port = *listener->LocalPort();
  {
    // Somebody listens, and never says a word.
    const absl::Status status =
        ConnectTcpStore(env, options, In(absl::Milliseconds(50))).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(TextOf(status), HasSubstr("no store answers there"));
  }
  listener->Close();
  const absl::Status status =
      ConnectTcpStore(env, options, In(absl::Milliseconds(50))).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(TextOf(status), HasSubstr("nobody answers at 127.0.0.1:"));
}

// A server that ends while clients greet it.
TEST(TcpStoreConnectTest, AConnectionThatEndsAtOnceIsNoAnswer) {
  absl::StatusOr<Socket> listener = ListenAt(env, "127.0.0.1", 0, Soon());
  ASSERT_TRUE(listener.ok());
  TcpStoreOptions options;
  options.port = *listener->LocalPort();
  std::atomic<bool> done = false;
  std::thread server([&] {
    while (!done) (void)AcceptFrom(*listener);
  });
  const absl::Status status =
      ConnectTcpStore(env, options, In(absl::Milliseconds(300))).status();
  done = true;
  server.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  // As the deadline comes, the last connection has ended or not.
  EXPECT_THAT(TextOf(status), AnyOf(HasSubstr("nobody answers at 127.0.0.1:"),
                                    HasSubstr("no store answers there")));
}

// A resolver that does not answer, as one of the system does for minutes when
// its servers are out of reach.
absl::Notification* resolver_release = nullptr;  // kept: threads outlive tests
int SilentResolver(const char*, const char*, const addrinfo* hints,
                   addrinfo**) {
  if ((hints->ai_flags & AI_NUMERICHOST) == 0) {
    resolver_release->WaitForNotification();
  }
  return EAI_NONAME;
}

TEST(SocketTest, ANameThatTheSystemIsSlowToFindEndsAtTheDeadline) {
  resolver_release = new absl::Notification;
  const Resolver before = SetResolverForTesting(&SilentResolver);
  const absl::Status statuses[] = {
      ConnectTo(env, "node7", 1, In(absl::Milliseconds(30))).status(),
      ListenAt(env, "node7", 0, In(absl::Milliseconds(30))).status(),
      AddressTowards(env, "node7", In(absl::Milliseconds(30))).status()};
  resolver_release->Notify();
  const absl::Status unknown = ListenAt(env, "node7", 0, Soon()).status();
  SetResolverForTesting(before);
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(TextOf(status),
                HasSubstr("the address of host \"node7\" within"));
  }
  EXPECT_EQ(unknown.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(TextOf(unknown), HasSubstr("host \"node7\" is unknown"));
}

TEST(SocketTest, NamesAreFound) {
  const absl::StatusOr<Socket> listener = ListenAt(env, "localhost", 0, Soon());
  ASSERT_TRUE(listener.ok()) << listener.status();
  const absl::StatusOr<Socket> connection =
      ConnectTo(env, "localhost", *listener->LocalPort(), Soon());
  ASSERT_TRUE(connection.ok()) << connection.status();
  EXPECT_FALSE(IsConnectedToItself(*connection));
  // The other host may vanish.
  int on = 0;
  socklen_t size = sizeof(on);
  getsockopt(connection->fd(), SOL_SOCKET, SO_KEEPALIVE, &on, &size);
  EXPECT_EQ(on, 1);
}

// The kernel may give a client that tries again and again the very port at
// which it tries.
TEST(SocketTest, AConnectionToItselfIsNoticed) {
  const Socket socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  sockaddr* const any = reinterpret_cast<sockaddr*>(&address);
  ASSERT_EQ(bind(socket.fd(), any, size), 0);
  ASSERT_EQ(getsockname(socket.fd(), any, &size), 0);
  ASSERT_EQ(connect(socket.fd(), any, size), 0);
  EXPECT_TRUE(IsConnectedToItself(socket));
}

// The server comes later than its clients.
TEST(TcpStoreConnectTest, ClientsWaitForTheServer) {
  absl::StatusOr<Socket> listener = ListenAt(env, "127.0.0.1", 0, Soon());
  ASSERT_TRUE(listener.ok());
  TcpStoreOptions options;
  options.port = *listener->LocalPort();
  std::thread client([&] {
    const auto store = ConnectTcpStore(env, options, Soon());
    ASSERT_TRUE(store.ok()) << store.status();
    EXPECT_EQ((*store)->Set("k", "v", Soon()), absl::OkStatus());
  });
  TcpStoreServerOptions server_options;
  server_options.listen_fd = listener->fd();
  const auto server = TcpStoreServer::Start(env, server_options, Soon());
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ((*server)->port(), options.port);
  client.join();
}

}  // namespace
}  // namespace dsd
