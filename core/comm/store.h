// SPDX-License-Identifier: Apache-2.0
//
// A key/value store through which ranks find each other, and which watches over
// them. Small values only; the data plane is the Communicator.

#ifndef DSD_CORE_COMM_STORE_H_
#define DSD_CORE_COMM_STORE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "dsd/core/comm/membership.h"

namespace dsd {

class Env;

// Thread-safe. Deadlines are times of the Env the store was made with.
// Errors of all calls: DeadlineExceeded (names key and deadline), Unavailable
// (the server is gone: rank 0 died).
class Store {
 public:
  virtual ~Store() = default;

  // Returns when the value is stored; replaces an older one.
  virtual absl::Status Set(absl::string_view key, absl::string_view value,
                           absl::Time deadline) = 0;

  // Waits for the key.
  virtual absl::StatusOr<std::string> Get(absl::string_view key,
                                          absl::Time deadline) = 0;

  // Adds to a decimal counter (0 if absent) and returns the new value.
  // InvalidArgument if the value is no decimal number.
  virtual absl::StatusOr<int64_t> Add(absl::string_view key, int64_t delta,
                                      absl::Time deadline) = 0;

  // Becomes a member of options.group and waits until all of its ranks are.
  // Errors, also: DeadlineExceeded naming the ranks that did not come;
  // FailedPrecondition if ranks differ in `size` or `facts`, or one comes
  // twice; the failure of a group that has failed.
  virtual absl::StatusOr<std::unique_ptr<Membership>> Join(
      const MemberOptions& options, absl::Time deadline) = 0;

  // The host through which the ranks meet, a number such as "10.0.0.1"; empty
  // if they are threads of one process.
  virtual std::string server_host() const = 0;
};

// For ranks that are threads of one process.
std::shared_ptr<Store> MakeInProcessStore(Env* env);

// `store` with "<prefix>/" before each key and group.
std::shared_ptr<Store> MakePrefixStore(absl::string_view prefix,
                                       std::shared_ptr<Store> store);

}  // namespace dsd

#endif  // DSD_CORE_COMM_STORE_H_
