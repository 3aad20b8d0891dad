// SPDX-License-Identifier: Apache-2.0

#include <sys/mman.h>

#include <memory>
#include <thread>
#include <vector>

#include "dsd/backends/ucx/ucx_backend.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/store.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

constexpr size_t kBytes = (size_t{4} << 30) + 4097;
constexpr size_t kStep = (size_t{64} << 20) - 1;

// Memory that takes room only where it is written.
absl::Span<std::byte> Reserve() {
  void* const memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return {};
  return absl::MakeSpan(static_cast<std::byte*>(memory), kBytes);
}

TEST(UcxLargeMessageTest, AMessageOfMoreThan4GiBArrives) {
  const std::shared_ptr<Store> store = MakeInProcessStore(Env::Real());
  const absl::Span<std::byte> from = Reserve();
  const absl::Span<std::byte> to = Reserve();
  ASSERT_FALSE(from.empty() || to.empty());
  for (size_t i = 0; i < kBytes; i += kStep) from[i] = std::byte(i / kStep + 1);
  from[kBytes - 1] = std::byte{0xff};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      const absl::Time deadline = Env::Real()->Now() + absl::Minutes(4);
      EngineOptions options;
      options.rank = rank;
      options.world_size = 2;
      options.env = Env::Real();
      options.store = store;
      auto engine = *UcxBackend().create(options);
      ASSERT_EQ(engine->Connect(deadline), absl::OkStatus());
      auto batch = rank == 0 ? engine->Start({{1, 1, from}}, {})
                             : engine->Start({}, {{0, 1, to}});
      ASSERT_TRUE(batch.ok()) << batch.status();
      EXPECT_EQ((*batch)->Wait(deadline), absl::OkStatus());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < kBytes; i += kStep) ASSERT_EQ(to[i], from[i]) << i;
  EXPECT_EQ(to[kBytes - 1], std::byte{0xff});
  munmap(from.data(), kBytes);
  munmap(to.data(), kBytes);
}

}  // namespace
}  // namespace dsd
