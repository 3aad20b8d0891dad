#!/usr/bin/env python3
"""Tests of test_summary.py."""

import contextlib
import io
import json
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import test_summary  # pylint: disable=wrong-import-position

GTEST_XML = """<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="4" failures="1" disabled="1" errors="0" name="AllTests">
  <testsuite name="Box" tests="4">
    <testcase name="Fits" status="run" result="completed" classname="Box" />
    <testcase name="Breaks" status="run" result="completed" classname="Box">
      <failure message="box_test.cc:7&#x0A;Value of: x" type=""><![CDATA[box_test.cc:7]]></failure>
    </testcase>
    <testcase name="NeedsGpu" status="run" result="skipped" classname="Box">
      <skipped message="core/box_test.cc:9&#x0A;no GPU&#x0A;on this machine" />
    </testcase>
    <testcase name="DISABLED_Old" status="notrun" result="suppressed" classname="Box" />
  </testsuite>
</testsuites>
"""

SHELL_XML = """<?xml version="1.0" encoding="UTF-8"?>
<testsuites><testsuite name="tools/shell_test" tests="1" failures="0" errors="0">
<testcase name="tools/shell_test" status="run" duration="0" time="0"></testcase>
<system-out>Generated test.log</system-out></testsuite></testsuites>
"""


class TestSummaryTest(unittest.TestCase):

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = folder.name

  def file(self, name, text):
    path = os.path.join(self.folder, name)
    with open(path, "w", encoding="utf-8") as out:
      out.write(text)
    return path

  def result(self, label, status, xml=None, shard=1, attempt=1):
    outputs = [{"name": "test.log", "uri": "file:///nowhere"}]
    if xml is not None:
      path = self.file("%d %d.xml" % (shard, attempt), xml)
      outputs.append({"name": "test.xml",
                      "uri": "file://" + path.replace(" ", "%20")})
    return {
        "id": {"testResult": {"label": label, "run": 1, "shard": shard,
                              "attempt": attempt}},
        "testResult": {"status": status, "testActionOutput": outputs}}

  def run_on(self, events, status=0):
    path = self.file("events", "".join(json.dumps(e) + "\n" for e in events))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      code = test_summary.main(["", path, str(status)])
    return code, out.getvalue().splitlines()

  def test_counts_cases_and_gives_reasons(self):
    code, lines = self.run_on([self.result("//core:box_test", "FAILED",
                                           GTEST_XML)], 3)
    self.assertEqual(lines, [
        "SKIPPED: //core:box_test Box.NeedsGpu: no GPU on this machine",
        "SKIPPED: //core:box_test Box.DISABLED_Old: disabled",
        "FAILED: //core:box_test Box.Breaks: box_test.cc:7 Value of: x",
        "2 skipped",
        "1 passed, 1 failed",
    ])
    self.assertEqual(code, 1)

  def test_cases_skipped_for_one_reason_are_one_line(self):
    xml = ("<testsuites><testsuite name='Box'>" + "".join(
        "<testcase name='Gpu%d' classname='Box' status='run' result='skipped'>"
        "<skipped message='no GPU'/></testcase>" % i for i in range(3)) +
        "<testcase name='Works' classname='Box' status='run' result='completed'/>"
        "</testsuite></testsuites>")
    _, lines = self.run_on([self.result("//core:box_test", "PASSED", xml)])
    self.assertEqual(lines, [
        "SKIPPED: //core:box_test Box.Gpu0 and 2 more: no GPU",
        "3 skipped",
        "1 passed, 0 failed",
    ])

  def test_all_passed(self):
    code, lines = self.run_on([self.result("//tools:shell_test", "PASSED",
                                           SHELL_XML)])
    self.assertEqual(lines, ["1 passed, 0 failed"])
    self.assertEqual(code, 0)

  def test_shards_add_up_and_the_last_attempt_counts(self):
    code, lines = self.run_on([
        self.result("//a:b_test", "FAILED", GTEST_XML, shard=1, attempt=1),
        self.result("//a:b_test", "PASSED", SHELL_XML, shard=1, attempt=2),
        self.result("//a:b_test", "PASSED", SHELL_XML, shard=2, attempt=1),
    ])
    self.assertEqual(lines, ["2 passed, 0 failed"])
    self.assertEqual(code, 0)

  def test_a_test_that_left_half_a_result_failed(self):
    _, lines = self.run_on([self.result("//a:b_test", "TIMEOUT",
                                        GTEST_XML[:200])], 3)
    self.assertEqual(lines, ["FAILED: //a:b_test: the test as a whole: TIMEOUT",
                             "0 passed, 1 failed"])

  def test_a_test_that_was_not_built_failed(self):
    code, lines = self.run_on([
        {"id": {"targetConfigured": {"label": "//a:b_test"}},
         "configured": {"targetKind": "cc_test rule"}},
        {"id": {"targetConfigured": {"label": "//a:lib"}},
         "configured": {"targetKind": "cc_library rule"}},
        {"id": {"targetCompleted": {"label": "//a:b_test"}}, "completed": {}},
        {"id": {"targetCompleted": {"label": "//a:lib"}}, "completed": {}},
        self.result("//tools:shell_test", "PASSED", SHELL_XML),
    ], 1)
    self.assertEqual(lines, ["FAILED: //a:b_test: not run: it was not built",
                             "PROBLEM: //a:lib was not built",
                             "1 passed, 1 failed"])
    self.assertEqual(code, 1)

  def test_an_incompatible_test_is_skipped(self):
    code, lines = self.run_on([
        {"id": {"targetCompleted": {"label": "//a:gpu_test"}},
         "aborted": {"reason": "SKIPPED", "description": "skipped"}},
        self.result("//tools:shell_test", "PASSED", SHELL_XML),
    ])
    self.assertEqual(lines[0][:24], "SKIPPED: //a:gpu_test: c")
    self.assertEqual(lines[-2:], ["1 skipped", "1 passed, 0 failed"])
    self.assertEqual(code, 0)

  def test_nothing_run_is_no_success(self):
    all_disabled = SHELL_XML.replace('"run"', '"notrun"')
    for events in ([], [self.result("//a:b_test", "PASSED", all_disabled)]):
      code, lines = self.run_on(events)
      self.assertIn("PROBLEM: nothing was run", lines)
      self.assertEqual(lines[-1][:18], "0 passed, 0 failed")
      self.assertEqual(code, 1)

  def test_a_broken_build_is_no_success(self):
    code, lines = self.run_on([
        {"id": {"pattern": {"pattern": ["//..."]}},
         "aborted": {"reason": "LOADING_FAILURE", "description": "no such\nlabel"}},
        self.result("//tools:shell_test", "PASSED", SHELL_XML),
    ], 1)
    self.assertEqual(lines, [
        "PROBLEM: LOADING_FAILURE no such label",
        "PROBLEM: Bazel ended with status 1", "1 passed, 0 failed"])
    self.assertEqual(code, 1)

  def test_no_events_at_all(self):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      code = test_summary.main(["", os.path.join(self.folder, "none"), "0"])
    self.assertEqual(code, 1)
    self.assertEqual(out.getvalue().splitlines()[-1], "0 passed, 0 failed")


if __name__ == "__main__":
  unittest.main()
