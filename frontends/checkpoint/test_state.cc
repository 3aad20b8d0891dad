// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/test_state.h"

#include <memory>
#include <random>

#include "absl/log/check.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/value/flatten.h"
#include "dsd/testing/harness/rank_threads.h"

namespace dsd::checkpoint {
namespace {

constexpr std::byte kBlank{0xEE};

int64_t SizeOf(const TestTensor& tensor) {
  return tensor.layout.whole().num_elements() * ItemSize(tensor.dtype);
}

}  // namespace

std::vector<absl::Status> StatusOfRanks(
    int world_size, absl::FunctionRef<absl::Status(Communicator&)> body) {
  std::vector<absl::Status> statuses(world_size);
  const std::vector<absl::Status> left =
      RunRankThreads(world_size, [&](Communicator& comm) {
        statuses[comm.rank()] = body(comm);
        return comm.Barrier();
      });
  for (int rank = 0; rank < world_size; ++rank) {
    // Nothing here is to break the communicator.
    if (!left[rank].ok()) {
      statuses[rank] = absl::InternalError(
          absl::StrCat("the communicator broke: ", left[rank].ToString()));
    }
  }
  return statuses;
}

std::vector<std::byte> TestBytes(uint64_t seed, const std::string& key,
                                 int64_t size) {
  std::mt19937_64 random(seed ^ DigestOfBytes(key).low);
  std::vector<std::byte> bytes(size);
  // 0 and 1 are bytes of every dtype.
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() & 1);
  return bytes;
}

TestState::TestState(const std::vector<TestTensor>& tensors, int rank,
                     const uint64_t* seed, std::vector<ObjectEntry> objects)
    : rank_(rank), endpoint_(std::make_unique<MemoryEndpoint>()) {
  for (const TestTensor& tensor : tensors) {
    const std::string key = JoinPath(tensor.path);
    Buffer buffer{tensor, std::vector<std::byte>(SizeOf(tensor), kBlank)};
    const std::vector<std::byte> content =
        seed != nullptr ? TestBytes(*seed, key, SizeOf(tensor))
                        : std::vector<std::byte>();
    const int64_t item_size = ItemSize(tensor.dtype);
    const Dims strides = RowMajorStrides(tensor.layout.shape());
    std::vector<MemoryEndpoint::Part> parts;
    for (const LocalBox& local : tensor.layout.BoxesOf(rank)) {
      MemoryEndpoint::Part part;
      part.box = local.box;
      const int64_t offset =
          FlatIndex(tensor.layout.shape(), local.box.lo) * item_size;
      part.view.base = buffer.bytes.data() + offset;
      for (const int64_t stride : strides) {
        part.view.strides_bytes.push_back(stride * item_size);
      }
      if (seed != nullptr) {
        StridedView from = part.view;
        from.base = const_cast<std::byte*>(content.data()) + offset;
        CopyBox(from, part.view, part.box.extents(), item_size);
      }
      parts.push_back(std::move(part));
    }
    CHECK_OK(
        endpoint_->Add({key, tensor.dtype, tensor.layout}, std::move(parts)));
    state_.tensor_paths.push_back(tensor.path);
    buffers_.push_back(std::move(buffer));
  }
  state_.tensors = endpoint_.get();
  state_.objects = std::move(objects);
}

TestState TestState::Filled(const std::vector<TestTensor>& tensors, int rank,
                            uint64_t seed, std::vector<ObjectEntry> objects) {
  return TestState(tensors, rank, &seed, std::move(objects));
}

TestState TestState::Blank(const std::vector<TestTensor>& tensors, int rank,
                           std::vector<ObjectEntry> objects) {
  return TestState(tensors, rank, nullptr, std::move(objects));
}

std::string TestState::Difference(uint64_t seed) const {
  std::vector<TestTensor> tensors;
  for (const Buffer& buffer : buffers_) tensors.push_back(buffer.tensor);
  const TestState expected = Filled(tensors, rank_, seed);
  for (size_t i = 0; i < buffers_.size(); ++i) {
    for (size_t at = 0; at < buffers_[i].bytes.size(); ++at) {
      if (buffers_[i].bytes[at] != expected.buffers_[i].bytes[at]) {
        return absl::StrCat("\"", JoinPath(buffers_[i].tensor.path),
                            "\" differs at byte ", at, " on rank ", rank_);
      }
    }
  }
  return "";
}

bool TestState::IsBlank() const {
  for (const Buffer& buffer : buffers_) {
    for (const std::byte byte : buffer.bytes) {
      if (byte != kBlank) return false;
    }
  }
  return true;
}

}  // namespace dsd::checkpoint
