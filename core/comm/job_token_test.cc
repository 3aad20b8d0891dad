// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/job_token.h"

#include <fstream>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr char kToken[] = "0123456789abcdef";

std::string File(absl::string_view name, absl::string_view content) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/", name);
  std::ofstream(path) << content;
  return path;
}

LaunchInfo WithFile(const std::string& path) {
  LaunchInfo launch;
  launch.token_file = path;
  return launch;
}

TEST(JobTokenTest, NoneIsNone) {
  EXPECT_EQ(*FindToken(Env::Real(), LaunchInfo()), "");
}

TEST(JobTokenTest, FromTheVariableOrTheFile) {
  LaunchInfo launch;
  launch.token = kToken;
  EXPECT_EQ(*FindToken(Env::Real(), launch), kToken);
  EXPECT_EQ(*FindToken(Env::Real(),
                       WithFile(File("token", absl::StrCat(kToken, "\r\n")))),
            kToken);
}

TEST(JobTokenTest, WhatIsNoTokenIsNamed) {
  LaunchInfo launch = WithFile(File("token", kToken));
  launch.token = kToken;
  EXPECT_EQ(FindToken(Env::Real(), launch).status().code(),
            absl::StatusCode::kInvalidArgument);
  launch.token_file.clear();
  launch.token = "short";
  const absl::Status status = FindToken(Env::Real(), launch).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("DSD_TOKEN"), HasSubstr("5 characters"),
                    ::testing::Not(HasSubstr("short"))));
  for (const std::string& content :
       {std::string(), std::string(1025, 'x'), std::string(100000, 'x'),
        std::string(kToken).substr(1) + "\n"}) {
    EXPECT_EQ(
        FindToken(Env::Real(), WithFile(File("bad", content))).status().code(),
        absl::StatusCode::kInvalidArgument)
        << content.size();
  }
  const absl::Status missing =
      FindToken(Env::Real(), WithFile("/nowhere/token")).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()),
              AllOf(HasSubstr("DSD_TOKEN_FILE"), HasSubstr("/nowhere/token")));
}

// On the wire: computed once with Python's hmac.
TEST(JobTokenTest, ProofsAreHmacSha256) {
  const std::string client(kNonceBytes, 'c');
  const std::string server(kNonceBytes, 's');
  EXPECT_EQ(absl::BytesToHexString(
                *TokenProof(kToken, TokenSide::kClient, "job", client, server)),
            "d79010bed8762888600b8de258645b91c3503084f73abd4e30ec1da88f5b17ea");
}

TEST(JobTokenTest, EveryPartOfAProofCounts) {
  const auto proof = [](absl::string_view token, TokenSide side,
                        absl::string_view job, absl::string_view client,
                        absl::string_view server) {
    return *TokenProof(token, side, job, client, server);
  };
  const std::string one = proof(kToken, TokenSide::kClient, "j", "cc", "ss");
  EXPECT_TRUE(
      SameProof(one, proof(kToken, TokenSide::kClient, "j", "cc", "ss")));
  for (const std::string& other :
       {proof("0123456789abcdeg", TokenSide::kClient, "j", "cc", "ss"),
        proof(kToken, TokenSide::kServer, "j", "cc", "ss"),
        proof(kToken, TokenSide::kClient, "k", "cc", "ss"),
        proof(kToken, TokenSide::kClient, "j", "cs", "cs"),
        proof(kToken, TokenSide::kClient, "j", "ccs", "s"),
        proof(kToken, TokenSide::kClient, "", "cc", "ssj"), std::string(),
        one.substr(1)}) {
    EXPECT_FALSE(SameProof(one, other));
  }
  EXPECT_NE(NewNonce(Env::Real()), NewNonce(Env::Real()));
  EXPECT_EQ(NewNonce(Env::Real()).size(), kNonceBytes);
}

}  // namespace
}  // namespace dsd
