#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/cli.md, run: what stands after each `$` line is what the program prints.

    cli_doc_test.py DSD EXAMPLE_CHECKPOINT docs/cli.md [--update]

--update writes what the program prints into the page.
"""

import os
import re
import subprocess
import sys
import tempfile

# Ids of saves, others each time, and the ones that stand in the page.
IDS = [(re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "3f8a1c0d-5e7b-492a-8c1d-2e4f6a8b0c1d"),
       (re.compile(r"(?<=_)[0-9a-f]{16}(?=\.distcp)"), "3f8a1c0d5e7b492a")]


def normal(text):
  """The ids of the page, and no blanks at the ends of lines."""
  for pattern, sample in IDS:
    text = pattern.sub(sample, text)
  return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))


def run(command, folder, programs):
  """What a terminal would show, without its colours."""
  env = {"PATH": programs + ":" + os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8"}
  done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        text=True, check=False)
  return done.stdout


def parts_of(block):
  """[(command, what it prints)] of a block."""
  parts = []
  for line in block.split("\n"):
    if line.startswith("$ "):
      parts.append((line[2:], []))
    elif parts:
      parts[-1][1].append(line)
  return [(command, normal("\n".join(lines))) for command, lines in parts]


def main():
  dsd, example, page = (os.path.abspath(a) for a in sys.argv[1:4])
  folder = tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR"))
  subprocess.run([example, folder], check=True)
  with open(page, encoding="utf-8") as text:
    content = text.read()
  different, count = [], 0

  def replaced(match):
    nonlocal count
    out = []
    for command, expected in parts_of(match.group(1)):
      count += 1
      found = normal(run(command, folder, os.path.dirname(dsd)))
      if found != expected:
        different.append("$ %s\n--- the page\n%s\n--- the program\n%s\n" % (command, expected, found))
      out.append("$ " + command + ("\n" + found if found else ""))
    return "```console\n" + "\n".join(out) + "\n```"

  updated = re.sub(r"```console\n(.*?)\n```", replaced, content, flags=re.DOTALL)
  if sys.argv[4:] == ["--update"]:
    with open(page, "w", encoding="utf-8") as text:
      text.write(updated)
    return 0
  print("\n".join(different))
  print("%d examples, %d differ%s" % (count, len(different), "; --update writes the page anew" if different else ""))
  return 1 if different or count < 10 else 0


if __name__ == "__main__":
  sys.exit(main())
