// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/conformance/conformance.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "absl/base/no_destructor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"

namespace dsd {
namespace {

std::vector<ConformanceCase>& Cases() {
  static absl::NoDestructor<std::vector<ConformanceCase>> cases;
  return *cases;
}

std::map<std::string, ConformanceRequirement>& Requirements() {
  static absl::NoDestructor<std::map<std::string, ConformanceRequirement>>
      requirements;
  return *requirements;
}

}  // namespace

ConformanceRegistration::ConformanceRegistration(const ConformanceCase& one) {
  Cases().push_back(one);
}

std::vector<ConformanceCase> ConformanceCases() {
  std::vector<ConformanceCase> cases = Cases();
  std::sort(cases.begin(), cases.end(),
            [](const ConformanceCase& a, const ConformanceCase& b) {
              return absl::string_view(a.name) < b.name;
            });
  return cases;
}

ConformanceRequirementRegistration::ConformanceRequirementRegistration(
    const char* backend, ConformanceRequirement requirement) {
  Requirements()[backend] = requirement;
}

absl::Status CheckConformanceRequirement(absl::string_view backend, int ranks) {
  const auto it = Requirements().find(std::string(backend));
  return it == Requirements().end() ? absl::OkStatus() : it->second(ranks);
}

absl::Status Expect(const absl::Status& found, absl::StatusCode code,
                    absl::Span<const absl::string_view> parts) {
  bool good = found.code() == code;
  for (absl::string_view part : parts) {
    good &= absl::StrContains(found.message(), part);
  }
  if (good) return absl::OkStatus();
  std::string text = absl::StrCat("expected ", absl::StatusCodeToString(code));
  for (absl::string_view part : parts)
    absl::StrAppend(&text, " \"", part, "\"");
  return absl::InternalError(absl::StrCat(text, ", found ", found.ToString()));
}

absl::Status Check(bool ok, absl::string_view what) {
  return ok ? absl::OkStatus() : absl::InternalError(what);
}

std::vector<std::byte> Pattern(uint64_t seed, size_t size) {
  std::vector<std::byte> bytes(size);
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (size_t i = 0; i < size; i += sizeof(state)) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    std::memcpy(bytes.data() + i, &state, std::min(sizeof(state), size - i));
  }
  return bytes;
}

absl::Status WaitForFailure(const Communicator& comm) {
  const absl::Time end = comm.env()->Now() + absl::Minutes(1);
  while (comm.status().ok()) {
    if (comm.env()->Now() >= end) {
      return absl::InternalError("the group has not failed within a minute");
    }
    comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(2));
  }
  return absl::OkStatus();
}

}  // namespace dsd
