// SPDX-License-Identifier: Apache-2.0

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/duration_text.h"
#include "dsd/core/comm/group_table.h"
#include "dsd/core/comm/store.h"

namespace dsd {
namespace {

class InProcessStore final
    : public Store,
      public std::enable_shared_from_this<InProcessStore> {
 public:
  explicit InProcessStore(Env* env) : env_(env) {}

  absl::Status Set(absl::string_view key, absl::string_view value,
                   absl::Time) override {
    absl::MutexLock lock(&mu_);
    values_[key] = std::string(value);
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(absl::string_view key,
                                  absl::Time deadline) override {
    const absl::Time start = env_->Now();
    absl::MutexLock lock(&mu_);
    const auto present = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
      return values_.contains(key);
    };
    if (!env_->Await(mu_, absl::Condition(&present), deadline)) {
      return absl::DeadlineExceededError(
          absl::StrCat("key \"", key, "\" was not set within ",
                       DurationText(deadline - start)));
    }
    return values_.at(key);
  }

  absl::StatusOr<int64_t> Add(absl::string_view key, int64_t delta,
                              absl::Time) override {
    absl::MutexLock lock(&mu_);
    std::string& value = values_[key];
    DSD_RETURN_IF_ERROR(AddToCounter(key, delta, value));
    int64_t sum = 0;
    if (!absl::SimpleAtoi(value, &sum)) {
      return absl::InternalError("store: a sum is no number");
    }
    return sum;
  }

  absl::StatusOr<std::unique_ptr<Membership>> Join(
      const MemberOptions& options, absl::Time deadline) override;

  std::string server_host() const override { return ""; }

 private:
  class Handle;

  struct Member {
    explicit Member(const MemberOptions& o) : options(o) {}
    MemberOptions options;
    // Guarded by the store's mu_.
    std::optional<absl::Status> joined;
    std::optional<absl::Status> left;
    std::optional<absl::Status> failure;  // of its group, not yet told
    // Held while a callback runs; `deaf` when none may run any more.
    absl::Mutex callback_mu;
    bool deaf ABSL_GUARDED_BY(callback_mu) = false;
  };
  using Failed = std::vector<std::shared_ptr<Member>>;

  // What `events` change here; who is to be told of a failure when mu_ is free.
  Failed Apply(const std::vector<GroupTable::Event>& events)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Failed failed;
    for (const GroupTable::Event& event : events) {
      const auto it = members_.find(event.member);
      if (it == members_.end()) continue;
      switch (event.kind) {
        case GroupTable::EventKind::kJoined:
          it->second->joined = event.status;
          break;
        case GroupTable::EventKind::kLeft:
          it->second->left = event.status;
          break;
        case GroupTable::EventKind::kFailed:
          it->second->failure = event.status;
          failed.push_back(it->second);
          break;
      }
    }
    return failed;
  }

  // Tells a member of the failure of its group, if it has not heard of it.
  void Tell(Member& member) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&member.callback_mu);
    std::optional<absl::Status> failure;
    {
      absl::MutexLock store_lock(&mu_);
      failure = std::exchange(member.failure, std::nullopt);
    }
    if (failure.has_value() && !member.deaf) {
      member.options.on_failure(*failure);
    }
  }
  void Report(const Failed& failed) ABSL_LOCKS_EXCLUDED(mu_) {
    for (const std::shared_ptr<Member>& member : failed) Tell(*member);
  }

  Env* const env_;
  absl::Mutex mu_;
  absl::flat_hash_map<std::string, std::string> values_ ABSL_GUARDED_BY(mu_);
  GroupTable groups_ ABSL_GUARDED_BY(mu_);
  GroupTable::MemberId next_id_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_map<GroupTable::MemberId, std::shared_ptr<Member>> members_
      ABSL_GUARDED_BY(mu_);
};

class InProcessStore::Handle final : public Membership {
 public:
  Handle(std::shared_ptr<InProcessStore> store, GroupTable::MemberId id,
         std::shared_ptr<Member> member)
      : store_(std::move(store)), id_(id), member_(std::move(member)) {}

  ~Handle() override {
    Failed failed;
    {
      absl::MutexLock lock(&store_->mu_);
      failed = store_->Apply(
          store_->groups_.Remove(id_, "left the group without Shutdown"));
      store_->members_.erase(id_);
    }
    {
      absl::MutexLock lock(&member_->callback_mu);
      member_->deaf = true;
    }
    store_->Report(failed);
  }

  void Fail(const absl::Status& status) override {
    Failed failed;
    {
      absl::MutexLock lock(&store_->mu_);
      failed = store_->Apply(store_->groups_.Fail(id_, status));
    }
    store_->Report(failed);
  }

  absl::Status Leave(absl::Time deadline) override {
    absl::MutexLock lock(&store_->mu_);
    const Failed none = store_->Apply(store_->groups_.Leave(id_));
    const auto left = [&] { return member_->left.has_value(); };
    if (!store_->env_->Await(store_->mu_, absl::Condition(&left), deadline)) {
      return absl::DeadlineExceededError("not all ranks left the group");
    }
    return *member_->left;
  }

  std::vector<std::optional<std::string>> Ask(absl::string_view question,
                                              absl::Time) override {
    std::vector<std::shared_ptr<Member>> asked;
    {
      absl::MutexLock lock(&store_->mu_);
      for (const GroupTable::Member& peer : store_->groups_.Peers(id_)) {
        const auto it = store_->members_.find(peer.id);
        if (it != store_->members_.end()) asked.push_back(it->second);
      }
    }
    std::vector<std::optional<std::string>> answers(member_->options.size);
    for (const std::shared_ptr<Member>& member : asked) {
      absl::MutexLock lock(&member->callback_mu);
      if (member->deaf || !member->options.on_question) continue;
      answers[member->options.rank] = member->options.on_question(question);
    }
    // Who has heard of a failure may be gone, and must not be taken for one who
    // does not answer.
    store_->Tell(*member_);
    return answers;
  }

 private:
  const std::shared_ptr<InProcessStore> store_;
  const GroupTable::MemberId id_;
  const std::shared_ptr<Member> member_;
};

absl::StatusOr<std::unique_ptr<Membership>> InProcessStore::Join(
    const MemberOptions& options, absl::Time deadline) {
  const auto member = std::make_shared<Member>(options);
  GroupTable::MemberId id;
  Failed failed;
  absl::Status joined;
  {
    absl::MutexLock lock(&mu_);
    id = next_id_++;
    members_[id] = member;
    const absl::Time now = env_->Now();
    failed = Apply(groups_.Join(id, options.group, options.rank, options.size,
                                options.facts, deadline - now, now));
    const auto answered = [&] { return member->joined.has_value(); };
    if (!env_->Await(mu_, absl::Condition(&answered), deadline)) {
      failed = Apply(groups_.Expire(deadline));
    }
    joined = *member->joined;
    if (!joined.ok()) members_.erase(id);
  }
  Report(failed);
  if (!joined.ok()) return joined;
  return std::make_unique<Handle>(shared_from_this(), id, member);
}

class PrefixStore final : public ForwardingStore {
 public:
  PrefixStore(absl::string_view prefix, std::shared_ptr<Store> store)
      : ForwardingStore(std::move(store)), prefix_(absl::StrCat(prefix, "/")) {}

  absl::Status Set(absl::string_view key, absl::string_view value,
                   absl::Time deadline) override {
    return to_->Set(absl::StrCat(prefix_, key), value, deadline);
  }
  absl::StatusOr<std::string> Get(absl::string_view key,
                                  absl::Time deadline) override {
    return to_->Get(absl::StrCat(prefix_, key), deadline);
  }
  absl::StatusOr<int64_t> Add(absl::string_view key, int64_t delta,
                              absl::Time deadline) override {
    return to_->Add(absl::StrCat(prefix_, key), delta, deadline);
  }
  absl::StatusOr<std::unique_ptr<Membership>> Join(
      const MemberOptions& options, absl::Time deadline) override {
    MemberOptions prefixed = options;
    prefixed.group = absl::StrCat(prefix_, options.group);
    return to_->Join(prefixed, deadline);
  }

 private:
  const std::string prefix_;
};

}  // namespace

absl::Status AddToCounter(absl::string_view key, int64_t delta,
                          std::string& value) {
  int64_t number = 0;
  if ((!value.empty() && !absl::SimpleAtoi(value, &number)) ||
      __builtin_add_overflow(number, delta, &number)) {
    return absl::InvalidArgumentError(
        absl::StrCat("key \"", key, "\" holds no decimal number to which ",
                     delta, " can be added"));
  }
  value = absl::StrCat(number);
  return absl::OkStatus();
}

std::shared_ptr<Store> MakeInProcessStore(Env* env) {
  return std::make_shared<InProcessStore>(env);
}

std::shared_ptr<Store> MakePrefixStore(absl::string_view prefix,
                                       std::shared_ptr<Store> store) {
  return std::make_shared<PrefixStore>(prefix, std::move(store));
}

}  // namespace dsd
