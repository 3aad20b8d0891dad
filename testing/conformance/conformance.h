// SPDX-License-Identifier: Apache-2.0
//
// What every backend must do, written once. A case runs on all ranks of a
// group; a rank returns OK if everything was as it must be, errors included.
//
//   DSD_CONFORMANCE_CASE(RanksMeet) {  // absl::Status RanksMeet(Communicator&
//   comm)
//     return comm.Barrier();
//   }
//
// Cases stand in libraries with alwayslink; defs.bzl makes a test per backend.

#ifndef DSD_TESTING_CONFORMANCE_CONFORMANCE_H_
#define DSD_TESTING_CONFORMANCE_CONFORMANCE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/comm/communicator.h"

namespace dsd {

struct ConformanceCase {
  const char* name;
  absl::Status (*body)(Communicator& comm);
  int min_ranks;
  int max_ranks;
  bool needs_device_memory = false;
};

// All that are linked, sorted by name.
std::vector<ConformanceCase> ConformanceCases();

class ConformanceRegistration {
 public:
  explicit ConformanceRegistration(const ConformanceCase& one);
};

#define DSD_CONFORMANCE_CASE(name) DSD_CONFORMANCE_CASE_FROM(name, 1)
// For groups of at least `min_ranks`.
#define DSD_CONFORMANCE_CASE_FROM(name, min_ranks) \
  DSD_CONFORMANCE_CASE_ON(name, min_ranks, 1 << 30)
// For groups of `min_ranks` to `max_ranks`.
#define DSD_CONFORMANCE_CASE_ON(name, min_ranks, max_ranks)       \
  static absl::Status name##Case(::dsd::Communicator& comm);      \
  static const ::dsd::ConformanceRegistration name##Registration( \
      {#name, &name##Case, min_ranks, max_ranks});                \
  static absl::Status name##Case([[maybe_unused]] ::dsd::Communicator& comm)
// For backends with cuda_memory; see device_memory.h.
#define DSD_DEVICE_CONFORMANCE_CASE(name)                              \
  static absl::Status name##Case(::dsd::Communicator& comm);           \
  static const ::dsd::ConformanceRegistration name##Registration(      \
      {#name, &name##Case, 2, 1 << 30, /*needs_device_memory=*/true}); \
  static absl::Status name##Case(::dsd::Communicator& comm)

// Why `ranks` ranks of a backend cannot run here, for backends that need more
// than a network. Given beside the cases.
using ConformanceRequirement = absl::Status (*)(int ranks);
class ConformanceRequirementRegistration {
 public:
  ConformanceRequirementRegistration(const char* backend,
                                     ConformanceRequirement requirement);
};
// OK, or FailedPrecondition with the reason to skip.
absl::Status CheckConformanceRequirement(absl::string_view backend, int ranks);

// OK if `found` has this code and its text contains all of `parts`.
absl::Status Expect(const absl::Status& found, absl::StatusCode code,
                    absl::Span<const absl::string_view> parts);

// Internal, naming `what`, unless `ok`.
absl::Status Check(bool ok, absl::string_view what);

// Bytes that depend on the seed and the place.
std::vector<std::byte> Pattern(uint64_t seed, size_t size);

// Waits until the group has failed; a minute at most.
absl::Status WaitForFailure(const Communicator& comm);

}  // namespace dsd

#endif  // DSD_TESTING_CONFORMANCE_CONFORMANCE_H_
