// SPDX-License-Identifier: Apache-2.0
//
// A program that links the backend and no other.

#include <string>

#include "dsd/backends/nccl/nccl_backend.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

TEST(NcclCompanionTest, NoneIsNotFoundWithTheRemedy) {
  EngineOptions options;
  options.world_size = 2;
  options.env = Env::Real();
  options.store = MakeInProcessStore(Env::Real());
  const auto engine = NcclBackend().create(options);
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(engine.status().message()),
              ::testing::HasSubstr("add //backends/gloo to deps"));
}

}  // namespace
}  // namespace dsd
