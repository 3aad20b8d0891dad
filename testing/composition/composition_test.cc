// SPDX-License-Identifier: Apache-2.0
//
// What a static link of some backends registers. Compiled once per combination,
// with DSD_EXPECTED_BACKENDS the names that must be there, in order.

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/registry.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

std::vector<std::string> Expected() {
  return absl::StrSplit(DSD_EXPECTED_BACKENDS, ',', absl::SkipEmpty());
}

TEST(CompositionTest, WhatIsLinkedIsThere) {
  EXPECT_EQ(LinkedBackends(), Expected());
  for (const std::string& name : Expected()) {
    const auto backend = FindBackend(name);
    ASSERT_TRUE(backend.ok()) << backend.status();
    EXPECT_EQ((*backend)->name, name);
  }
}

TEST(CompositionTest, WhatIsNotLinkedIsNamedWithTheRemedy) {
  const auto backend = FindBackend("carrier_pigeon");
  ASSERT_EQ(backend.status().code(), absl::StatusCode::kNotFound);
  const std::string text(backend.status().message());
  EXPECT_THAT(text, HasSubstr("no backend \"carrier_pigeon\" is linked"));
  EXPECT_THAT(text, HasSubstr("//backends/carrier_pigeon"));
  for (const std::string& name : Expected()) EXPECT_THAT(text, HasSubstr(name));
}

TEST(CompositionTest, TheDefaultIsTheOneOfTheBuild) {
  const auto backend = FindBackend("");
  if (Expected().empty()) {
    EXPECT_EQ(backend.status().code(), absl::StatusCode::kNotFound);
    return;
  }
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_EQ((*backend)->name, DSD_EXPECTED_DEFAULT);
}

TEST(CompositionTest, AWorldOfOneNeedsNoBackend) {
  const auto comm = Communicator::Create({});
  ASSERT_TRUE(comm.ok()) << comm.status();
  EXPECT_EQ((*comm)->size(), 1);
  EXPECT_TRUE((*comm)->Barrier().ok());
  EXPECT_TRUE((*comm)->Shutdown().ok());
}

}  // namespace
}  // namespace dsd
