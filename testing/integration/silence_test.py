#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A get of shards sends nothing and opens nothing: strace sees no such call between the marks of silent_get.cc.
Argument: the program."""

import collections
import os
import re
import shutil
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ranks  # noqa: E402

PROGRAM = os.path.abspath(sys.argv.pop(1))

CALL = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)")
NAME = re.compile(r'prctl\(PR_SET_NAME, "dsd:([^"]*)"')
CLONED = re.compile(r"= (\d+)$")
NETWORK = {"socket", "connect", "accept", "accept4", "bind", "listen", "sendto", "recvfrom", "sendmsg", "recvmsg",
           "sendmmsg", "recvmmsg", "shutdown", "getsockname", "getpeername", "socketpair", "setsockopt", "getsockopt"}
# Sockets are written to with these, too.
BYTES = {"write", "writev", "read", "readv"}


def calls_between_marks(trace):
    """Process -> mark -> names of the calls of all its threads while the mark held."""
    process_of = {}
    mark_of = {}
    cloning = set()
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in trace:
        call = CALL.match(line)
        if call is None:
            continue
        thread, name = int(call.group(1)), call.group(2)
        process = process_of.setdefault(thread, thread)
        if name in ("clone", "clone3"):
            if "CLONE_THREAD" in line:
                cloning.add(thread)
            child = CLONED.search(line)
            if child and thread in cloning:
                cloning.discard(thread)
                process_of[int(child.group(1))] = process
            continue
        mark = NAME.search(line)
        if mark:
            mark_of[process] = mark.group(1)
            found[process][mark.group(1)]  # seen, perhaps without any call
        elif mark_of.get(process, "end") != "end" and "resumed" not in line:
            found[process][mark_of[process]].append(line.strip())
    return found


class SilenceTest(unittest.TestCase):

    def test_sharded_get(self):
        if shutil.which("strace") is None:
            self.skipTest("strace is not installed; ./bazelw installs it")
        calls = sorted(NETWORK | BYTES | {"openat", "prctl", "clone", "clone3"})
        with tempfile.NamedTemporaryFile("r", suffix=".strace", dir=os.environ.get("TEST_TMPDIR")) as out:
            result = ranks.run(["strace", "-f", "-o", out.name, "-e", "trace=" + ",".join(calls), PROGRAM])
            trace = out.read().splitlines()
        if result.code != 0 and "ptrace" in result.err.lower():
            self.skipTest("ptrace is not allowed here: " + result.err.strip().splitlines()[0])
        self.assertEqual(result.code, 0, result)
        marked = [marks for marks in calls_between_marks(trace).values() if "message" in marks]
        self.assertEqual(len(marked), 2, "the marks of two ranks")
        for marks in marked:
            self.assertEqual(marks["first get"], [])
            self.assertEqual(marks["second get"], [])
            # Or strace would show nothing at all.
            self.assertNotEqual(marks["message"], [])
            print("%d calls in a message" % len(marks["message"]))


if __name__ == "__main__":
    ranks.main()
