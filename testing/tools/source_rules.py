#!/usr/bin/env python3
"""House rules that a text search over the sources can hold.

    source_rules.py <folder of the repository>

1. core/ and frontends/checkpoint/ sleep, wait, read clocks, start threads, draw random seeds and touch files through
   Env (core/base/env.h) only: that is what lets a simulation run them. Their tests (*_test.cc, *_benchmark.cc,
   *_fuzz.cc) may do all of it but sleep, since a sleep that orders events makes a test that sometimes fails.
2. No header includes torch/torch.h, which costs each of its users 15 seconds of compile time.

A file that must break a rule stands in EXCEPTIONS with the reason. Exit status 1 and a line per finding if a rule is
broken, or if an exception is no longer needed.
"""

import fnmatch
import os
import re
import sys

THROUGH_ENV = ("core/", "frontends/checkpoint/")
TESTS = ("*_test.cc", "*_benchmark.cc", "*_fuzz.cc")

# {path pattern: {rule: reason}}
EXCEPTIONS = {
    "core/base/*env.*": {
        "env": "this is Env",
        "sleep": "this is Env",
    },
    "core/base/directory_lock.cc": {
        "env": "the part of Env's files that few need",
    },
    "core/comm/socket.cc": {
        "env": "sockets; what may wait does so through Env::Poll",
    },
    "core/transfer/fake_device.cc": {
        "env": "memory that faults when the host touches it; for tests",
    },
}

# A function that is called, and is neither a member of something nor of a namespace other than std.
_CALL = r"(?<![\w.>:])(?:::|std::)?(?:%s)\s*\("

ENV_PATTERNS = [
    # Threads and what waits for them.
    r"\bstd::(?:thread|jthread|async|future|shared_future|promise|packaged_task|latch|barrier|counting_semaphore"
    r"|binary_semaphore|condition_variable(?:_any)?)\b",
    r"\babsl::(?:CondVar|Notification|Barrier|BlockingCounter)\b",
    _CALL % "pthread_create|sem_wait|sem_timedwait|poll|ppoll|select|pselect|epoll_wait|epoll_pwait|fork|system",
    r"(?:\.|->)\s*(?:AwaitWith\w+|LockWhen\w*|ReaderLockWhen\w*|WriterLockWhen\w*|WaitWith\w+)\s*\(",
    r"\b(?!\w*[eE]nv)\w+(?:\.|->)Await\s*\(",
    # Clocks.
    r"\babsl::(?:Now|GetCurrentTimeNanos)\s*\(",
    r"\bstd::chrono::(?:system|steady|high_resolution)_clock\b",
    _CALL % "clock_gettime|gettimeofday",
    _CALL % "time" + r"\s*(?:nullptr|NULL|0|&)",
    # Seeds that differ from run to run.
    r"\bstd::random_device\b",
    r"\babsl::(?:BitGen|InsecureBitGen)\b",
    # Files.
    r"\bstd::(?:basic_)?[io]?f(?:stream|ilebuf)\b",
    r"\bstd::filesystem\b",
    _CALL % ("open|openat|creat|fopen|freopen|fdopen|tmpfile|mkstemp|mkdtemp|pread|preadv|pwrite|pwritev|fsync"
             "|fdatasync|ftruncate|rename|renameat|unlink|unlinkat|mkdir|rmdir|opendir|readdir|stat|lstat|fstat"
             "|symlink|readlink|mmap|munmap"),
]
SLEEP_PATTERNS = [
    r"\babsl::SleepFor\b",
    r"\bstd::this_thread::sleep_",
    _CALL % "sleep|usleep|nanosleep|clock_nanosleep",
]
ENV_INCLUDES = re.compile(
    r"(?:thread|future|condition_variable|semaphore|latch|barrier|fstream|filesystem|fcntl\.h|unistd\.h|pthread\.h"
    r"|poll\.h|sys/(?:epoll|mman|stat|select|time)\.h|dirent\.h|absl/time/clock\.h"
    r"|absl/synchronization/(?:notification|blocking_counter|barrier)\.h)")

_ENV = re.compile("|".join(ENV_PATTERNS))
_SLEEP = re.compile("|".join(SLEEP_PATTERNS))
_INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]")
# What is not code: comments and literals, the raw ones first.
_NOT_CODE = re.compile(
    r'R"([^()\\ ]{0,16})\(.*?\)\1"|//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"'
    r"|(?<![0-9a-fA-F])'(?:[^'\\\n]|\\.)*'", re.DOTALL)


def blank(match):
  """Keeps the line breaks, so that line numbers stay true."""
  return "".join(c if c == "\n" else " " for c in match.group(0))


def rules_of(path):
  """The rules that hold for a file."""
  rules = []
  if path.startswith(THROUGH_ENV):
    rules.append("sleep")
    if not any(fnmatch.fnmatch(path, t) for t in TESTS):
      rules.append("env")
  if path.endswith(".h"):
    rules.append("torch.h")
  return rules


def findings(path, text):
  """Yields (line number, rule, the words found) in one file."""
  rules = rules_of(path)
  for number, line in enumerate(text.split("\n"), 1):
    include = _INCLUDE.match(line)
    if not include:
      continue
    if "torch.h" in rules and include.group(1) == "torch/torch.h":
      yield number, "torch.h", include.group(1)
    if "env" in rules and ENV_INCLUDES.fullmatch(include.group(1)):
      yield number, "env", include.group(1)
  for number, line in enumerate(_NOT_CODE.sub(blank, text).split("\n"), 1):
    for rule, pattern in (("sleep", _SLEEP), ("env", _ENV)):
      if rule in rules:
        for match in pattern.finditer(line):
          yield number, rule, match.group(0).strip()


def exception(path, rule, exceptions):
  """The pattern of the exception that covers the file, or None."""
  for pattern, by_rule in exceptions.items():
    if rule in by_rule and fnmatch.fnmatch(path, pattern):
      return pattern
  return None


def sources(root):
  """The C++ files of the repository. Bazel's folders in it are links, which are not followed."""
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(f for f in folders if not f.startswith("."))
    for name in sorted(files):
      if name.endswith((".h", ".cc")):
        yield os.path.relpath(os.path.join(folder, name), root)


def check(root, exceptions=None):
  """Returns (lines to print, number of files under a rule, broken)."""
  exceptions = EXCEPTIONS if exceptions is None else exceptions
  lines, used, count = [], set(), 0
  broken = False
  for path in sources(root):
    if not rules_of(path):
      continue
    count += 1
    with open(os.path.join(root, path), encoding="utf-8") as source:
      found = list(findings(path, source.read()))
    for number, rule, words in found:
      pattern = exception(path, rule, exceptions)
      if pattern:
        used.add((pattern, rule))
      else:
        broken = True
        lines.append("%s:%d: %s: %s" % (path, number, rule, words))
  for pattern, by_rule in exceptions.items():
    for rule, reason in by_rule.items():
      lines.append("exception: %s may break '%s': %s" % (pattern, rule, reason))
      if (pattern, rule) not in used:
        lines[-1] += " (nothing there breaks it any more: delete it)"
        broken = True
  return lines, count, broken


def main(argv):
  root = os.path.abspath(argv[1])
  if not os.path.exists(os.path.join(root, "core", "base", "env.h")):
    print("%s is not the repository: there is no core/base/env.h" % root)
    return 1
  lines, count, broken = check(root)
  print("\n".join(lines))
  print("%d files looked at" % count)
  if broken:
    print(__doc__)
  return 1 if broken else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
