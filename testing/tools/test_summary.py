#!/usr/bin/env python3
"""Says what a run of the tests came to, case by case.

    test_summary.py <build events> [<exit status of Bazel>]

Reads the build events that Bazel wrote during the run (one JSON object per line), so that exactly the tests of this
run count, results from the cache included, and from them the test.xml of each test. Prints the skipped cases with
their reasons and their number, the failed ones, and as its last line "N passed, N failed". Its exit status is 0 if
Bazel's was, nothing failed and something passed.
"""

import json
import re
import sys
import urllib.parse
import xml.etree.ElementTree as ElementTree

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def one_line(text):
  """The text on one line, cut to a readable length."""
  return " ".join((text or "").split())[:300]


def skip_reason(message):
  """The message of a skip without the place, with which GoogleTest begins it."""
  lines = (message or "").splitlines()
  return one_line("\n".join(
      l for l in lines if not re.fullmatch(r"\S+:\d+|Skipped", l.strip())
  )) or "no reason given"


def cases_of_xml(path):
  """Yields (case, outcome, text) for each case in a test.xml."""
  for case in ElementTree.parse(path).getroot().iter("testcase"):
    name = ".".join(p for p in (case.get("classname"), case.get("name")) if p)
    for tag in ("failure", "error"):
      found = case.find(tag)
      if found is not None:
        yield name, FAILED, one_line(found.get("message") or found.text)
        break
    else:
      skipped = case.find("skipped")
      if skipped is not None:
        yield name, SKIPPED, skip_reason(skipped.get("message") or skipped.text)
      elif case.get("status") == "notrun":
        yield name, SKIPPED, "disabled"
      else:
        yield name, PASSED, ""


def xml_of(result):
  for output in result.get("testActionOutput", []):
    if output.get("name") == "test.xml":
      uri = urllib.parse.urlparse(output.get("uri", ""))
      if uri.scheme == "file":
        return urllib.parse.unquote(uri.path)
  return None


def cases_of_result(label, result):
  """Yields (case, outcome, text) for one run of one test."""
  status = result.get("status", "NO_STATUS")
  path = xml_of(result)
  outcomes = []
  try:
    outcomes = list(cases_of_xml(path)) if path else []
  except (OSError, ElementTree.ParseError):
    pass  # A test that was killed leaves none or half of one.
  whole = label.split("//")[-1].replace(":", "/")  # as Bazel's own XML has it
  for name, outcome, text in outcomes:
    if outcome == FAILED and status != FAILED.upper():
      text = "%s: %s" % (status, text)
    yield label if name in ("", whole) else label + " " + name, outcome, text
  if status in ("PASSED", "FLAKY"):
    if not outcomes:
      yield label, PASSED, ""
  elif not any(outcome == FAILED for _, outcome, _ in outcomes):
    yield label, FAILED, "the test as a whole: " + status


def summarize(lines):
  """Returns [(case, outcome, text)] and [problem] of a stream of build events."""
  results = {}  # (label, run, shard) -> (attempt, result): the last attempt counts
  without = {}  # label -> why there may be no result
  tests = set()
  problems = []
  for line in lines:
    if not line.strip():
      continue
    event = json.loads(line)
    ident = event.get("id", {})
    if "testResult" in event:
      test = ident["testResult"]
      key = (test["label"], test.get("run", 1), test.get("shard", 1))
      attempt = test.get("attempt", 1)
      if attempt >= results.get(key, (0,))[0]:
        results[key] = (attempt, event["testResult"])
    elif "testSummary" in event:
      without.setdefault(ident["testSummary"]["label"],
                         event["testSummary"].get("overallStatus"))
    elif "configured" in event:
      if event["configured"].get("targetKind", "").endswith("_test rule"):
        tests.add(ident["targetConfigured"]["label"])
    elif "completed" in event:
      label = ident["targetCompleted"]["label"]
      if event["completed"].get("success"):
        pass
      elif label in tests:
        without[label] = "it was not built"
      else:
        problems.append(label + " was not built")
    elif "aborted" in event:
      reason = event["aborted"].get("reason", "UNKNOWN")
      label = next((v["label"] for v in ident.values()
                    if isinstance(v, dict) and "label" in v), "")
      text = event["aborted"].get("description", "")
      if reason == "SKIPPED":
        without[label] = SKIPPED
      elif text:  # Without one, it was stopped by what another event tells.
        problems.append(one_line("%s %s %s" % (label, reason, text)))

  cases = []
  for (label, _, _), (_, result) in sorted(results.items()):
    cases += cases_of_result(label, result)
  seen = {label for label, _, _ in results}
  for label, status in sorted(without.items()):
    if label in seen:
      continue
    if status == SKIPPED:
      cases.append((label, SKIPPED, "cannot be built on this platform or with these settings"))
    else:
      cases.append((label, FAILED, "not run: %s" % status))
  return cases, problems


def main(argv):
  try:
    with open(argv[1], encoding="utf-8") as events:
      cases, problems = summarize(events)
  except (OSError, ValueError) as error:
    cases, problems = [], ["no results could be read: %s" % error]
  status = int(argv[2]) if len(argv) > 2 else 0

  by_outcome = {
      outcome: [(name, text) for name, o, text in cases if o == outcome]
      for outcome in (PASSED, FAILED, SKIPPED)
  }
  skipped = {}  # (target, reason) -> cases: a suite may lack one thing
  for name, text in by_outcome[SKIPPED]:
    skipped.setdefault((name.split(" ")[0], text), []).append(name)
  for (_, text), names in skipped.items():
    print("SKIPPED: %s%s%s" % (names[0],
                               " and %d more" % (len(names) - 1) if len(names) > 1 else "",
                               ": " + text if text else ""))
  for name, text in by_outcome[FAILED]:
    print("FAILED: %s%s" % (name, ": " + text if text else ""))
  for problem in dict.fromkeys(problems):
    print("PROBLEM: " + problem)
  if not by_outcome[PASSED] and not by_outcome[FAILED]:
    print("PROBLEM: nothing was run")
  if status and not by_outcome[FAILED]:
    print("PROBLEM: Bazel ended with status %d" % status)
  if by_outcome[SKIPPED]:
    print("%d skipped" % len(by_outcome[SKIPPED]))
  print("%d passed, %d failed" % (len(by_outcome[PASSED]),
                                  len(by_outcome[FAILED])))
  good = not status and not by_outcome[FAILED] and by_outcome[PASSED]
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main(sys.argv))
