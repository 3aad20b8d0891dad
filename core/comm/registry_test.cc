// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/registry.h"

#include <memory>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::unique_ptr<Engine>> NoEngine(const EngineOptions&) {
  return absl::UnimplementedError("a fake");
}

BackendDescriptor Fake(absl::string_view name) {
  BackendDescriptor descriptor;
  descriptor.name = name;
  descriptor.create = &NoEngine;
  return descriptor;
}

const BackendDescriptor beta = Fake("beta");
const BackendDescriptor alpha = Fake("alpha");
const BackendDescriptor old = [] {
  BackendDescriptor descriptor = Fake("old");
  descriptor.api_version = kEngineApiVersion - 1;
  return descriptor;
}();
// A name may come twice by two ways to link one thing.
const BackendRegistration registrations[] = {
    BackendRegistration(beta), BackendRegistration(alpha),
    BackendRegistration(old), BackendRegistration(beta)};

TEST(RegistryTest, BackendsAreFoundByNameInWhateverOrder) {
  EXPECT_THAT(LinkedBackends(), ElementsAre("alpha", "beta", "old"));
  EXPECT_EQ(*FindBackend("beta"), &beta);
  EXPECT_EQ(*FindBackend("alpha"), &alpha);
}

TEST(RegistryTest, AMissingBackendIsNamedWithWhatToDo) {
  const absl::Status status = FindBackend("nccl").status();
  EXPECT_EQ(status, absl::NotFoundError(
                        "no backend \"nccl\" is linked (linked: alpha, beta, "
                        "old); add //backends/nccl to deps or build with "
                        "--//backends:default=nccl"));
}

TEST(RegistryTest, ABackendOfAnotherInterfaceIsRefused) {
  const absl::Status status = FindBackend("old").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("version 0"), HasSubstr("version 1")));
}

TEST(RegistryTest, TheDefaultDecidesBetweenSeveral) {
  const absl::Status status = FindBackend("").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("(alpha, beta, old) and none is the default"));
  const DefaultBackendRegistration with_default("beta");
  EXPECT_EQ(*FindBackend(""), &beta);
  EXPECT_EQ(*FindBackend("alpha"), &alpha);
}

TEST(RegistryDeathTest, TwoOfOneNameAreFatalAndBothNamed) {
  EXPECT_DEATH(
      {
        static const BackendDescriptor other = Fake("alpha");
        static const BackendRegistration again(other);
        LinkedBackends();
      },
      "two backends \"alpha\" are linked: one by .*registry_test, one by "
      ".*registry_test; link it in one of them only");
}

}  // namespace
}  // namespace dsd
