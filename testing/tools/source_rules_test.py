#!/usr/bin/env python3
"""Tests of source_rules.py."""

import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import source_rules  # pylint: disable=wrong-import-position

# One line per thing that only Env may do.
FORBIDDEN = """
#include <fcntl.h>
#include <thread>
#include "absl/time/clock.h"
std::thread t(f);
std::async(f);
std::condition_variable cv;
absl::CondVar cv;
absl::Notification done;
mu_.Await(absl::Condition(&ready));
state->mu.AwaitWithDeadline(c, d);
absl::Time now = absl::Now();
auto now = std::chrono::steady_clock::now();
clock_gettime(CLOCK_MONOTONIC, &ts);
x = time(nullptr);
int fd = ::open(path, O_RDONLY);
if (poll(fds, n, 0) < 0) {}
FILE* f = fopen(path, "r");
std::ifstream in(path);
std::ofstream out(path);
std::filesystem::exists(path);
return ::rename(a, b);
absl::BitGen gen;
std::random_device device;
"""

SLEEPS = """
absl::SleepFor(absl::Seconds(1));
std::this_thread::sleep_for(1s);
usleep(10);
"""

FINE = """
#include "absl/synchronization/mutex.h"
// std::thread and absl::Now() in a comment, /* or here
/* absl::SleepFor(x) */
const char* kText = "std::ifstream and ::open(path)";
const char* kRaw = R"(fopen(path, "r"); std::thread t;)";
char c = '"'; int big = 1'000'000;
env.SleepUntil(deadline);
env->Await(mu, absl::Condition(&ready), deadline);
options_.env->Await(mu, condition, deadline);
absl::MutexLock lock(&mu_);
file.open(path);
MyFile::open(path);
auto s = env->Now();
int opened = reopen(path);
const CallClock clock(env, call);
"""


class SourceRulesTest(unittest.TestCase):

  def words(self, path, text):
    return [(n, rule) for n, rule, _ in source_rules.findings(path, text)]

  def lines_of(self, text, rule):
    return [(n, rule) for n, line in enumerate(text.split("\n"), 1) if line]

  def test_each_forbidden_line_is_found(self):
    for path in ("core/plan/plan.cc", "frontends/checkpoint/dcp/dcp.h"):
      self.assertEqual(sorted(set(self.words(path, FORBIDDEN))),
                       self.lines_of(FORBIDDEN, "env"))
      self.assertEqual(sorted(set(self.words(path, SLEEPS))),
                       self.lines_of(SLEEPS, "sleep"))

  def test_what_looks_similar_is_fine(self):
    self.assertEqual(list(source_rules.findings("core/a/a.cc", FINE)), [])

  def test_elsewhere_it_is_allowed(self):
    for path in ("backends/gloo/gloo.cc", "testing/a.cc"):
      self.assertEqual(self.words(path, FORBIDDEN + SLEEPS), [])

  def test_tests_may_not_sleep(self):
    self.assertEqual(self.words("core/a/a_test.cc", FORBIDDEN), [])
    self.assertEqual(self.words("core/a/a_test.cc", SLEEPS),
                     self.lines_of(SLEEPS, "sleep"))

  def test_no_header_includes_torch_h(self):
    text = "#include <torch/torch.h>\n"
    self.assertEqual(self.words("testing/a.h", text), [(1, "torch.h")])
    self.assertEqual(self.words("testing/a.cc", text), [])
    self.assertEqual(self.words("testing/a.h", "#include <torch/types.h>"), [])

  def test_exceptions_are_named_and_must_be_needed(self):
    with tempfile.TemporaryDirectory() as root:
      os.makedirs(os.path.join(root, "core"))
      with open(os.path.join(root, "core", "a.cc"), "w",
                encoding="utf-8") as out:
        out.write("usleep(1);\n")
      lines, count, broken = source_rules.check(root, {})
      self.assertEqual((lines, count, broken),
                       (["core/a.cc:1: sleep: usleep("], 1, True))
      lines, _, broken = source_rules.check(
          root, {"core/a*": {"sleep": "a reason"}})
      self.assertEqual(lines,
                       ["exception: core/a* may break 'sleep': a reason"])
      self.assertFalse(broken)
      _, _, broken = source_rules.check(
          root, {"core/a*": {"sleep": "a reason", "env": "another"}})
      self.assertTrue(broken)


if __name__ == "__main__":
  unittest.main()
