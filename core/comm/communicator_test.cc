// SPDX-License-Identifier: Apache-2.0
//
// What needs no second rank, or one that is not there. The rest is the
// conformance suite, testing/conformance.

#include "dsd/core/comm/communicator.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "dsd/core/base/call_options.h"
#include "dsd/core/comm/envelope.h"
#include "dsd/testing/harness/no_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

std::string TextOf(const absl::Status& status) {
  return std::string(status.message());
}

std::unique_ptr<Communicator> WorldOfOne() {
  absl::StatusOr<std::unique_ptr<Communicator>> comm = Communicator::Create({});
  EXPECT_TRUE(comm.ok()) << comm.status();
  return *std::move(comm);
}

TEST(CommunicatorTest, AWorldOfOneNeedsNothing) {
  const auto comm = WorldOfOne();
  EXPECT_EQ(comm->size(), 1);
  EXPECT_EQ(comm->rank(), 0);
  std::vector<std::byte> data(100, std::byte{7});
  EXPECT_EQ(comm->Barrier(), absl::OkStatus());
  EXPECT_EQ(comm->Broadcast(absl::MakeSpan(data), 0), absl::OkStatus());
  EXPECT_EQ(
      comm->AllReduce(absl::MakeSpan(data), DType::kUInt8, ReduceOp::kSum),
      absl::OkStatus());
  EXPECT_EQ(data[50], std::byte{7});
  EXPECT_EQ(*comm->AllGatherBlobs("me", 2), std::vector<std::string>{"me"});
  EXPECT_EQ(comm->Shutdown(), absl::OkStatus());
  const absl::Status late = comm->Barrier();
  EXPECT_EQ(late.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(TextOf(late), HasSubstr("after Shutdown"));
}

TEST(CommunicatorTest, OptionsAreChecked) {
  CommunicatorOptions options;
  options.rank = 2;
  options.world_size = 2;
  EXPECT_EQ(Communicator::Create(options).status().code(),
            absl::StatusCode::kInvalidArgument);
  options.rank = 0;
  const absl::Status none = Communicator::Create(options).status();
  EXPECT_EQ(none.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(TextOf(none), HasSubstr("no backend is linked"));
  const BackendDescriptor descriptor = {
      "x", kEngineApiVersion, true, false, true, nullptr};
  options.descriptor = &descriptor;
  const absl::Status no_store = Communicator::Create(options).status();
  EXPECT_EQ(no_store.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(TextOf(no_store), HasSubstr("store is null"));
  // A name is looked up in a world of one, too.
  options = CommunicatorOptions();
  options.backend = "x";
  EXPECT_EQ(Communicator::Create(options).status().code(),
            absl::StatusCode::kNotFound);
}

TEST(CommunicatorTest, MessagesToItselfMatchInOrder) {
  const auto comm = WorldOfOne();
  const std::vector<std::byte> out(3000, std::byte{5});
  std::vector<std::byte> in(3000);
  absl::StatusOr<PendingExchange> recv =
      comm->StartExchange({}, {{0, absl::MakeSpan(in)}}, "self");
  ASSERT_TRUE(recv.ok());
  EXPECT_EQ(comm->Exchange({{0, out}}, {}, "self"), absl::OkStatus());
  EXPECT_EQ(recv->Wait(), absl::OkStatus());
  EXPECT_EQ(in, out);
  EXPECT_EQ(recv->Wait().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(CommunicatorTest, AMessageToItselfThatNobodySendsIsAnError) {
  const auto comm = WorldOfOne();
  std::vector<std::byte> in(10);
  const absl::Status status =
      comm->Exchange({}, {{0, absl::MakeSpan(in)}}, "self");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(TextOf(status), HasSubstr("has no counterpart"));
  EXPECT_EQ(comm->Barrier().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(CommunicatorTest, MessagesToItselfOfDifferentSizeAreAnError) {
  const auto comm = WorldOfOne();
  const std::vector<std::byte> out(11);
  std::vector<std::byte> in(10);
  const absl::Status status =
      comm->Exchange({{0, out}}, {{0, absl::MakeSpan(in)}}, "self");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(TextOf(status), HasSubstr("sends 11 bytes"));
}

TEST(CommunicatorTest, TheFirstReasonOfAnAbortStays) {
  const auto comm = WorldOfOne();
  comm->Abort(absl::DataLossError("first"));
  comm->Abort(absl::DataLossError("second"));
  const absl::Status status = comm->Barrier();
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
  EXPECT_THAT(TextOf(status), HasSubstr("DATA_LOSS: first"));
  EXPECT_EQ(comm->Shutdown().code(), absl::StatusCode::kAborted);
}

// Nobody could look for the cancel.
TEST(CommunicatorTest, ACallThatCanBeCancelledNeedsAThread) {
  const auto comm = WorldOfOne();
  const std::atomic<bool> cancel{false};
  CallOptions options;
  options.cancel = &cancel;
  const NoThreads none;
  const absl::Status status = comm->Exchange({}, {}, "nothing", options);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(TextOf(status), HasSubstr("exchange \"nothing\" on rank 0"));
  EXPECT_EQ(comm->Barrier().code(), absl::StatusCode::kResourceExhausted);
}

TEST(CommunicatorTest, LanesEndWithTheirCommunicator) {
  for (const bool shut_down : {false, true}) {
    auto comm = WorldOfOne();
    absl::StatusOr<std::unique_ptr<Communicator>> lane = comm->OpenLane("lane");
    ASSERT_TRUE(lane.ok()) << lane.status();
    absl::StatusOr<std::unique_ptr<Communicator>> part = comm->Split(0, 0);
    ASSERT_TRUE(part.ok()) << part.status();
    EXPECT_EQ((*lane)->Barrier(), absl::OkStatus());
    if (shut_down) {
      EXPECT_EQ(comm->Shutdown(), absl::OkStatus());
    }
    comm.reset();
    for (Communicator* const left : {lane->get(), part->get()}) {
      const absl::Status status = left->Barrier();
      EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
      EXPECT_THAT(TextOf(status), HasSubstr("was destroyed on rank 0"));
    }
  }
}

// On the wire, so it must not change by accident.
TEST(EnvelopeTest, LayoutAndTags) {
  EXPECT_EQ(offsetof(EnvelopeHead, version), 4);
  EXPECT_EQ(offsetof(EnvelopeHead, generation), 8);
  EXPECT_EQ(offsetof(EnvelopeHead, payload_size), 32);
  EXPECT_EQ(sizeof(EnvelopeHead), 48);
  EXPECT_EQ(kMaxEnvelopeBytes, 48 + 192 + 16384);
  // Different sizes, parts and numbers of one lane never share a tag.
  const uint64_t lane = 0x1234;
  EXPECT_NE(MessageTag(lane, 1, MessagePart::kPayload, 100),
            MessageTag(lane, 1, MessagePart::kPayload, 101));
  EXPECT_NE(MessageTag(lane, 1, MessagePart::kPayload, 100),
            MessageTag(lane, 1, MessagePart::kEnvelope, 100));
  EXPECT_NE(MessageTag(lane, 1, MessagePart::kPayload, 100),
            MessageTag(lane, 2, MessagePart::kEnvelope, 100));
  EXPECT_NE(MessageTag(lane, 1, MessagePart::kPayload, 100),
            MessageTag(lane + 1, 1, MessagePart::kPayload, 100));
}

}  // namespace
}  // namespace dsd
