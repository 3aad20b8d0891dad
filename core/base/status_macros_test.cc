// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/status_macros.h"

#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

TEST(StatusMacrosTest, ReturnsErrorsWithContext) {
  const auto run = [](const absl::Status& status) -> absl::Status {
    DSD_RETURN_IF_ERROR(status) << "file " << 7;
    return absl::CancelledError("went on");
  };
  EXPECT_EQ(run(absl::DataLossError("torn")),
            absl::DataLossError("file 7: torn"));
  EXPECT_EQ(run(absl::OkStatus()), absl::CancelledError("went on"));
}

// Compiling it is half of the test: warnings are errors.
TEST(StatusMacrosTest, IsOneStatementForIfAndElse) {
  const auto run = [](bool check, const absl::Status& status) -> absl::Status {
    if (check)
      DSD_RETURN_IF_ERROR(status) << "checked";
    else
      return absl::CancelledError("not checked");
    if (!check) DSD_RETURN_IF_ERROR(absl::InternalError("not reached"));
    for (int i = 0; i < 2; ++i) DSD_RETURN_IF_ERROR(status);
    return absl::OkStatus();
  };
  EXPECT_EQ(run(true, absl::OkStatus()), absl::OkStatus());
  EXPECT_EQ(run(true, absl::DataLossError("torn")),
            absl::DataLossError("checked: torn"));
  EXPECT_EQ(run(false, absl::OkStatus()), absl::CancelledError("not checked"));
}

TEST(StatusMacrosTest, KeepsPayloads) {
  absl::Status status = absl::DataLossError("torn");
  status.SetPayload("where", absl::Cord("here"));
  const absl::Status annotated = Annotate(status, "load");
  EXPECT_EQ(annotated.message(), "load: torn");
  EXPECT_EQ(annotated.GetPayload("where"), absl::Cord("here"));
  EXPECT_TRUE(Annotate(absl::OkStatus(), "load").ok());
}

TEST(StatusMacrosTest, AssignsAlsoWhatOnlyMoves) {
  const auto run =
      [](absl::StatusOr<std::unique_ptr<int>> value) -> absl::StatusOr<int> {
    DSD_ASSIGN_OR_RETURN(const std::unique_ptr<int> number, std::move(value));
    return *number;
  };
  EXPECT_EQ(*run(std::make_unique<int>(5)), 5);
  EXPECT_EQ(run(absl::NotFoundError("no")).status(), absl::NotFoundError("no"));
}

}  // namespace
}  // namespace dsd
