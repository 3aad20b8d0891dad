// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/test_checkpoint.h"

#include <unistd.h>

#include <atomic>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gtest/gtest.h"

namespace dsd::cli {

std::string Floats(int64_t count, float first, float step) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = first + step * static_cast<float>(i);
  }
  return BytesOf(values);
}

TestTensor FloatTensor(std::string key, Layout layout, float first) {
  const int64_t count = layout.whole().num_elements();
  return {std::move(key), DType::kFloat32, std::move(layout),
          Floats(count, first)};
}

TestTensor FloatTensor(std::string key, Dims shape, float first) {
  return FloatTensor(std::move(key), Layout::Replicated(std::move(shape), {0}),
                     first);
}

std::string NewPath(absl::string_view name) {
  static std::atomic<int> number{0};
  return absl::StrCat(testing::TempDir(), "/", name, "_", getpid(), "_",
                      number++);
}

absl::Status SaveTo(const std::string& directory,
                    const std::vector<TestTensor>& tensors,
                    const std::vector<checkpoint::ObjectEntry>& objects,
                    int ranks) {
  const auto save = [&](Communicator& comm) -> absl::Status {
    std::vector<std::string> memory;
    memory.reserve(tensors.size());
    MemoryEndpoint endpoint;
    for (const TestTensor& tensor : tensors) {
      memory.push_back(tensor.bytes);
      const int64_t item_size = ItemSize(tensor.dtype);
      const Dims strides = RowMajorStrides(tensor.layout.shape());
      std::vector<MemoryEndpoint::Part> parts;
      for (const LocalBox& local : tensor.layout.BoxesOf(comm.rank())) {
        StridedView view;
        view.base = reinterpret_cast<std::byte*>(memory.back().data()) +
                    FlatIndex(tensor.layout.shape(), local.box.lo) * item_size;
        for (const int64_t stride : strides) {
          view.strides_bytes.push_back(stride * item_size);
        }
        parts.push_back({local.box, view});
      }
      DSD_RETURN_IF_ERROR(endpoint.Add(
          {tensor.key, tensor.dtype, tensor.layout}, std::move(parts)));
    }
    checkpoint::State state;
    state.tensors = &endpoint;
    state.objects = objects;
    return checkpoint::Save(directory, state, &comm).status();
  };
  for (const absl::Status& status : RunRankThreads(ranks, save)) {
    DSD_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

std::string SaveCheckpoint(const std::vector<TestTensor>& tensors,
                           const std::vector<checkpoint::ObjectEntry>& objects,
                           int ranks) {
  const std::string directory = NewPath("checkpoint");
  const absl::Status status = SaveTo(directory, tensors, objects, ranks);
  EXPECT_TRUE(status.ok()) << status;
  return directory;
}

RunResult RunDsd(const std::vector<std::string>& arguments,
                 const Terminal& terminal) {
  std::vector<const char*> argv = {"dsd"};
  for (const std::string& argument : arguments) {
    argv.push_back(argument.c_str());
  }
  std::ostringstream out, err;
  const int code =
      Run(static_cast<int>(argv.size()), argv.data(), out, err, terminal);
  return {code, out.str(), err.str()};
}

}  // namespace dsd::cli
