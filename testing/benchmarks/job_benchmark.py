#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The whole of a small job as a process, beside PyTorch's in the same run, and `dsd ls` of what it saved. Prints wall and CPU
seconds, the least of a few runs, and fails if what was loaded differs.

usage: job_benchmark.py SMALL_JOB DSD PYTHON PEER [--quick]
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time


def run(command, runs, directory=None):
  """(least wall, its CPU, output) of a command; the directory is fresh in each run."""
  best = None
  for _ in range(runs):
    if directory is not None:
      shutil.rmtree(directory, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall = time.monotonic() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if best is None or wall < best[0]:
      best = (wall, cpu, output)
  return best


def main():
  quick = "--quick" in sys.argv
  small_job, dsd, python, peer = [word for word in sys.argv[1:] if word != "--quick"]
  runs = 2 if quick else 7
  same = True
  root = tempfile.mkdtemp()
  try:
    start = run([small_job, "--start"], runs)
    print("    loading LibTorch and nothing else: %.3f s (CPU %.3f)" % start[:2])
    for layers in (2, 8):
      ours = os.path.join(root, "dsd")
      theirs = os.path.join(root, "torch")
      mine = run([small_job, ours, str(layers)], runs, ours)
      other = run([python, peer, theirs, str(layers)], 2 if quick else 3, theirs)
      print("15. job of %d layers: PyTorch %.3f s (CPU %.3f), dsd %.3f s (CPU %.3f), %.0f ms beyond loading, ratio %.1fx" %
            (layers, *other[:2], *mine[:2], 1e3 * (mine[0] - start[0]), other[0] / mine[0]))
      equal = mine[2] == other[2]
      same &= equal
      print("    what was loaded: %s" % ("equal to PyTorch's" if equal else "NOT EQUAL"))
      listing = run([dsd, "ls", ours], runs)
      print("    dsd ls of it: %.1f ms (CPU %.1f)" % (1e3 * listing[0], 1e3 * listing[1]))
  finally:
    shutil.rmtree(root, ignore_errors=True)
  return 0 if same else 1


if __name__ == "__main__":
  sys.exit(main())
