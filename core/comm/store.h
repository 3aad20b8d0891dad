// SPDX-License-Identifier: Apache-2.0
//
// A key/value store through which ranks find each other, and which watches over
// them. Small values only; the data plane is the Communicator.

#ifndef DSD_CORE_COMM_STORE_H_
#define DSD_CORE_COMM_STORE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

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
  // InvalidArgument if the value is no decimal number or the sum none of 64
  // bits.
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

// Passes every call on; for stores that change some of them.
class ForwardingStore : public Store {
 public:
  explicit ForwardingStore(std::shared_ptr<Store> to) : to_(std::move(to)) {}

  absl::Status Set(absl::string_view key, absl::string_view value,
                   absl::Time deadline) override {
    return to_->Set(key, value, deadline);
  }
  absl::StatusOr<std::string> Get(absl::string_view key,
                                  absl::Time deadline) override {
    return to_->Get(key, deadline);
  }
  absl::StatusOr<int64_t> Add(absl::string_view key, int64_t delta,
                              absl::Time deadline) override {
    return to_->Add(key, delta, deadline);
  }
  absl::StatusOr<std::unique_ptr<Membership>> Join(
      const MemberOptions& options, absl::Time deadline) override {
    return to_->Join(options, deadline);
  }
  std::string server_host() const override { return to_->server_host(); }

 protected:
  std::shared_ptr<Store> to_;
};

// What Add does to a value, for stores.
absl::Status AddToCounter(absl::string_view key, int64_t delta,
                          std::string& value);

// For ranks that are threads of one process.
std::shared_ptr<Store> MakeInProcessStore(Env* env);

// `store` with "<prefix>/" before each key and group.
std::shared_ptr<Store> MakePrefixStore(absl::string_view prefix,
                                       std::shared_ptr<Store> store);

}  // namespace dsd

#endif  // DSD_CORE_COMM_STORE_H_
