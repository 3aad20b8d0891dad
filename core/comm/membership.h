// SPDX-License-Identifier: Apache-2.0
//
// Who takes part in a group, and who is gone. Data connections do not report
// every death, so a store also watches its clients: what it says about a group
// is what all its members hear.

#ifndef DSD_CORE_COMM_MEMBERSHIP_H_
#define DSD_CORE_COMM_MEMBERSHIP_H_

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace dsd {

struct MemberOptions {
  std::string group;
  int rank = 0;
  int size = 1;
  // What all members must have in common, for people: `backend "gloo", api 1`.
  std::string facts;
  // Called from threads of the store, never after the Membership is destroyed,
  // and must return at once.
  //
  // The group has failed: a member died, left without Leave, or called Fail. At
  // most once; not for this member's own Fail. The text names the rank.
  std::function<void(const absl::Status&)> on_failure;
  // What another member asks, see Membership::Ask. May be empty.
  std::function<std::string(absl::string_view question)> on_question;
};

// One rank's place in a group. Thread-safe. Being destroyed without Leave, like
// the end of the process, is a death for the others.
class Membership {
 public:
  virtual ~Membership() = default;

  // Tells all other members, in the code and text of `status`. The first
  // failure of a group counts. Returns at once.
  virtual void Fail(const absl::Status& status) = 0;

  // Waits until all members have called it; after that nobody's end is a death.
  // Errors: DeadlineExceeded; the group's failure; what Store may return.
  virtual absl::Status Leave(absl::Time deadline) = 0;

  // The answers of all members to `question`, by rank; nullopt for a rank that
  // did not answer before the deadline.
  virtual std::vector<std::optional<std::string>> Ask(
      absl::string_view question, absl::Time deadline) = 0;
};

}  // namespace dsd

#endif  // DSD_CORE_COMM_MEMBERSHIP_H_
