// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/sim/scheduler.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/backends/sim/sim_env.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::sim {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Some threads of one process, with an Env.
struct World {
  explicit World(uint64_t seed)
      : scheduler(seed),
        process(scheduler.AddProcess("rank 0")),
        env(&scheduler, process, nullptr, nullptr) {}

  void Start(absl::string_view name, absl::AnyInvocable<void()> body) {
    threads.push_back(env.StartThread(name, std::move(body)));
  }

  Scheduler scheduler;
  const Scheduler::Process process;
  SimEnv env;
  std::vector<std::unique_ptr<EnvThread>> threads;
};

TEST(SchedulerTest, TimeJumpsWhenNobodyCanRun) {
  World world(1);
  const absl::Time start = world.env.Now();
  std::vector<std::string> order;
  for (const int hours : {3, 1, 2}) {
    world.Start("sleeper", [&world, &order, start, hours] {
      world.env.SleepUntil(start + absl::Hours(hours));
      order.push_back(absl::StrCat(
          hours, " at ", absl::ToInt64Hours(world.env.Now() - start)));
    });
  }
  EXPECT_TRUE(world.scheduler.Run().ok());
  EXPECT_THAT(order, ElementsAre("1 at 1", "2 at 2", "3 at 3"));
}

TEST(SchedulerTest, AwaitEndsWithTheConditionOrAtTheDeadline) {
  World world(1);
  absl::Mutex mu;
  bool flag = false;
  bool first = false;
  bool second = true;
  const absl::Time start = world.env.Now();
  world.Start("waiter", [&] {
    absl::MutexLock lock(&mu);
    first =
        world.env.Await(mu, absl::Condition(&flag), start + absl::Seconds(10));
    EXPECT_LT(world.env.Now(), start + absl::Seconds(2));
    const bool never = false;
    second =
        world.env.Await(mu, absl::Condition(&never), start + absl::Seconds(10));
    EXPECT_GE(world.env.Now(), start + absl::Seconds(10));
  });
  world.Start("setter", [&] {
    world.env.SleepUntil(start + absl::Seconds(1));
    absl::MutexLock lock(&mu);
    flag = true;
  });
  EXPECT_TRUE(world.scheduler.Run().ok());
  EXPECT_TRUE(first);
  EXPECT_FALSE(second);
}

// Increments that are not atomic: what comes out depends on the order.
std::string Race(uint64_t seed, uint64_t* trace) {
  World world(seed);
  std::string order;
  for (int t = 0; t < 4; ++t) {
    world.Start(absl::StrCat("thread ", t), [&world, &order, t] {
      for (int i = 0; i < 5; ++i) {
        absl::StrAppend(&order, t);
        world.scheduler.Yield();
      }
      const auto child = world.env.StartThread("child", [&order, t] {
        order.push_back(static_cast<char>('a' + t));
      });
    });
  }
  EXPECT_TRUE(world.scheduler.Run().ok());
  *trace = world.scheduler.trace();
  return order;
}

TEST(SchedulerTest, TheSeedIsTheOrder) {
  std::vector<std::string> orders;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    uint64_t first;
    uint64_t second;
    orders.push_back(Race(seed, &first));
    EXPECT_EQ(orders.back(), Race(seed, &second));
    EXPECT_EQ(first, second);
  }
  std::sort(orders.begin(), orders.end());
  EXPECT_EQ(std::unique(orders.begin(), orders.end()), orders.end());
}

TEST(SchedulerTest, ADeadlockIsReportedWithWhatEachThreadWaitsFor) {
  World world(1);
  absl::Mutex mu;
  const bool never = false;
  world.Start("stuck", [&] {
    const Scheduler::Waiting waiting(&world.scheduler, "for a miracle");
    absl::MutexLock lock(&mu);
    world.env.Await(mu, absl::Condition(&never), absl::InfiniteFuture());
  });
  world.Start("joiner", [&] {
    const auto child = world.env.StartThread("child", [&] {
      absl::MutexLock lock(&mu);
      world.env.Await(mu, absl::Condition(&never), absl::InfiniteFuture());
    });
  });
  const absl::Status status = world.scheduler.Run();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(
      std::string(status.message()),
      AllOf(HasSubstr("deadlock"),
            HasSubstr("thread \"stuck\" of rank 0: waits for a miracle"),
            HasSubstr("thread \"joiner\" of rank 0: waits for the end of "
                      "thread \"child\""),
            HasSubstr("thread \"child\" of rank 0: waits in ")));
}

TEST(SchedulerTest, ALivelockIsReported) {
  World world(1);
  world.scheduler.SetMaxSteps(10000);
  world.Start("runner", [&] {
    while (!world.scheduler.IsRunningOut()) world.scheduler.Yield();
  });
  EXPECT_THAT(std::string(world.scheduler.Run().message()),
              HasSubstr("livelock"));
}

// Dead threads stand still until the end, then their destructors run.
TEST(SchedulerTest, TheDeadDoNothing) {
  World world(1);
  bool ran_on = false;
  bool destroyed = false;
  world.scheduler.SetYieldHook([&](Scheduler::Process process, int64_t number) {
    if (number == 3) world.scheduler.Kill(process);
  });
  const auto note = [&](void*) {
    EXPECT_TRUE(world.scheduler.IsRunningOut());
    destroyed = true;
  };
  world.Start("victim", [&] {
    int object = 0;
    const std::unique_ptr<void, decltype(note)> guard(&object, note);
    for (int i = 0; i < 10; ++i) {
      world.env.SleepUntil(world.env.Now() + absl::Seconds(1));
      ran_on |= i >= 2 && !world.scheduler.IsRunningOut();
    }
  });
  EXPECT_TRUE(world.scheduler.Run().ok());
  EXPECT_TRUE(world.scheduler.IsDead(world.process));
  EXPECT_FALSE(ran_on);
  EXPECT_TRUE(destroyed);
}

TEST(SchedulerTest, ThePausedStandStill) {
  World world(1);
  const absl::Time start = world.env.Now();
  world.scheduler.SetYieldHook([&](Scheduler::Process process, int64_t number) {
    if (number == 1) {
      world.scheduler.Pause(process, start + absl::Minutes(5));
    }
  });
  world.Start("slow", [&] {
    world.scheduler.Yield();
    EXPECT_GE(world.env.Now(), start + absl::Minutes(5));
  });
  EXPECT_TRUE(world.scheduler.Run().ok());
}

TEST(SchedulerDeathTest, AMutexHeldWhileWaitingIsFound) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      {
        World world(1);
        absl::Mutex other;
        const bool never = false;
        world.Start("holder", [&] {
          world.env.SleepUntil(world.env.Now() + absl::Seconds(1));
          absl::MutexLock lock(&other);
          world.env.SleepUntil(world.env.Now() + absl::Seconds(2));
        });
        world.Start("needer", [&] {
          absl::MutexLock lock(&other);
          world.env.Await(other, absl::Condition(&never),
                          world.env.Now() + absl::Seconds(5));
        });
        world.scheduler.Run().IgnoreError();
      },
      "waits while it holds a mutex that thread needer needs");
}

}  // namespace
}  // namespace dsd::sim
