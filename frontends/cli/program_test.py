#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The dsd program as a process: pipes, terminals, permissions, exit codes.

    program_test.py DSD EXAMPLE_CHECKPOINT
"""

import ctypes
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import tempfile
import time
import unittest

DSD = EXAMPLE = FOLDER = None


def run(*arguments, env=None, **options):
  return subprocess.run([DSD, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False,
                        env={"PATH": os.environ.get("PATH", "/bin"), **(env or {})}, timeout=120, **options)


def on_terminal(*arguments, env):
  """What a terminal gets of the output."""
  controller, terminal = pty.openpty()
  process = subprocess.Popen([DSD, *arguments], cwd=FOLDER, stdout=terminal, stderr=subprocess.DEVNULL, env=env)
  os.close(terminal)
  shown = b""
  while True:
    try:
      part = os.read(controller, 65536)
    except OSError:  # the other end is closed
      break
    if not part:
      break
    shown += part
  os.close(controller)
  process.wait()
  return shown.decode()


def obey_permissions():
  """Takes from root what lets it go everywhere; the program that is started next does not get it back."""
  if os.geteuid() != 0:
    return
  drop, override, search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
  for capability in (override, search):
    assert ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0) == 0


class ProgramTest(unittest.TestCase):

  def test_a_closed_pipe_is_quiet(self):
    # More than a pipe holds.
    done = subprocess.run(["bash", "-c", '"$0" cat run1 model.embed.weight --full | head -n 1', DSD], cwd=FOLDER,
                          capture_output=True, text=True, check=False)
    self.assertTrue(done.stdout.startswith("model.embed.weight  bfloat16"))
    self.assertEqual(done.stdout.count("\n"), 1)
    self.assertEqual(done.stderr, "")

  def test_output_that_cannot_be_written(self):
    with open("/dev/full", "w", encoding="utf-8") as full:
      done = subprocess.run([DSD, "ls", "run1"], cwd=FOLDER, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    self.assertEqual(done.returncode, 4)
    self.assertEqual(done.stderr, "dsd: the output could not be written\n")

  def test_colours_are_for_terminals(self):
    self.assertNotIn("\033", run("ls", "run1").stdout)
    self.assertIn("\033[1m", on_terminal("ls", "run1", env={"TERM": "xterm"}))
    for env in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
      self.assertNotIn("\033", on_terminal("ls", "run1", env=env))
    self.assertIn("\033[31m-\033[0m", on_terminal("diff", "run1", "run2", env={"TERM": "xterm"}))

  def test_every_reading_command_prints_json(self):
    for arguments in (["ls", "run1"], ["info", "run1"], ["cat", "run1", "step"], ["diff", "run1", "run2"],
                      ["verify", "run1"], ["digest", "run1"], ["plan", "run1", "--to", "2"],
                      ["plot", "run1", "-o", "plot.svg"]):
      done = run(*arguments, "--json")
      self.assertIsInstance(json.loads(done.stdout), dict, arguments)
      self.assertEqual(done.stderr, "", arguments)

  def test_bad_input_of_every_command(self):
    os.makedirs(os.path.join(FOLDER, "empty"), exist_ok=True)
    with open(os.path.join(FOLDER, "file"), "w", encoding="utf-8") as file:
      file.write("no checkpoint")
    broken = os.path.join(FOLDER, "broken")
    os.makedirs(broken, exist_ok=True)
    with open(os.path.join(broken, ".metadata"), "wb") as file:
      file.write(b"\x80\x04garbage")
    for command in (["ls", "X"], ["info", "X"], ["cat", "X", "k"], ["cat", "X"], ["diff", "X", "run1"],
                    ["diff", "run1", "X"], ["verify", "X"], ["digest", "X"], ["plan", "X", "--to", "2"],
                    ["plot", "X", "-o", "plot.svg"]):
      for place, words in (("nowhere", "no checkpoint at"), ("empty", "no checkpoint at"), ("file", "file"),
                           ("broken", ".metadata")):
        arguments = [place if a == "X" else a for a in command]
        done = run(*arguments)
        self.assertIn(done.returncode, (1, 3), arguments)
        if command[0] == "diff":
          self.assertEqual(done.returncode, 3, arguments)
        self.assertIn(words, done.stderr + done.stdout, arguments)
        for line in done.stderr.splitlines():
          self.assertTrue(line.startswith("dsd: "), (arguments, line))
        as_json = run(*arguments, "--json")
        self.assertEqual(as_json.returncode, done.returncode, arguments)
        json.loads(as_json.stdout)
      for wrong in ([command[0]], [command[0], "--frobnicate"], command + ["a", "b", "--to"]):
        if wrong[0] == "cat" and len(wrong) > 2:
          continue
        done = run(*wrong)
        self.assertEqual(done.returncode, 2, wrong)
        self.assertTrue(done.stderr.startswith("dsd: "), (wrong, done.stderr))
        self.assertEqual(done.stdout, "", wrong)

  def test_no_permission(self):
    closed = os.path.join(FOLDER, "closed")
    subprocess.run(["cp", "-r", os.path.join(FOLDER, "run1"), closed], check=True)
    os.chmod(closed, 0)
    done = run("ls", closed, preexec_fn=obey_permissions)
    os.chmod(closed, 0o700)
    self.assertEqual(done.returncode, 3)
    self.assertIn("ermission denied", done.stderr)

  def test_saves_at_once_into_one_directory(self):
    for _ in range(5):
      jobs = [subprocess.Popen([DSD, "convert", "run1", "race", "--to", "dcp", "--overwrite"], cwd=FOLDER,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(4)]
      errors = [job.communicate(timeout=120)[1] for job in jobs]
      self.assertIn(0, [job.returncode for job in jobs], errors)
      for job, error in zip(jobs, errors):
        if job.returncode != 0:
          self.assertIn("another save to \"race\" is under way", error)
      self.assertEqual(run("verify", "race").returncode, 0)
      self.assertEqual(len(os.listdir(os.path.join(FOLDER, "race"))), 3)

  def test_sizes_are_those_of_what_links_point_to(self):
    links = os.path.join(FOLDER, "links")
    os.mkdir(links)
    for name in os.listdir(os.path.join(FOLDER, "run1")):
      os.symlink(os.path.join("..", "run1", name), os.path.join(links, name))
    files = [json.loads(run("info", "--json", directory).stdout)["files"] for directory in ("run1", "links")]
    self.assertGreater(min(file["file_bytes"] for file in files[0].values()), 1 << 20)
    self.assertEqual(files[1], files[0])

  def test_a_target_that_cannot_be_written(self):
    def convert(target, *options, **how):
      done = run("convert", "run1", target, "--to=dcp", *options, **how)
      self.assertIn(target, done.stderr)
      self.assertEqual(done.stdout, "")
      return done.returncode

    def with_little_room():
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    self.assertEqual(convert("run2"), 4)  # something is there
    os.mkdir(os.path.join(FOLDER, "locked"), 0o500)
    self.assertEqual(convert("locked/new", preexec_fn=obey_permissions), 4)
    self.assertEqual(convert("locked", preexec_fn=obey_permissions), 4)
    self.assertEqual(convert("full", preexec_fn=with_little_room), 4)
    self.assertFalse(os.path.exists(os.path.join(FOLDER, "full")))
    # What is wrong with the source is another matter.
    self.assertEqual(run("convert", "nowhere", "new", "--to=dcp").returncode, 3)
    closed = os.path.join(FOLDER, "closed_files")
    subprocess.run(["cp", "-r", os.path.join(FOLDER, "run1"), closed], check=True)
    for name in os.listdir(closed):
      if name.startswith("__1_"):
        os.chmod(os.path.join(closed, name), 0)
    done = run("convert", "closed_files", "new", "--to=dcp", preexec_fn=obey_permissions)
    self.assertEqual(done.returncode, 3, done.stderr)
    self.assertFalse(os.path.exists(os.path.join(FOLDER, "new")))

  def test_a_conversion_that_is_stopped(self):
    size = 1 << 30
    header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(os.path.join(FOLDER, "large.safetensors"), "wb") as file:
      file.write(len(header).to_bytes(8, "little") + header)
      file.truncate(8 + len(header) + size)
    for number, target in ((signal.SIGINT, "stopped/dcp"), (signal.SIGTERM, "stopped/dcp"),
                           (signal.SIGINT, "stopped/t.safetensors"), (signal.SIGTERM, "stopped/t.pt")):
      # Signals that were ignored stay so.
      job = subprocess.Popen([DSD, "convert", "large.safetensors", target, "--to",
                              "torch" if target.endswith(".pt") else target.split("/")[1].split(".")[-1]], cwd=FOLDER,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
      # Until it has begun to write.
      while job.poll() is None and not any(files for _, _, files in os.walk(os.path.join(FOLDER, "stopped"))):
        time.sleep(0.001)
      job.send_signal(number)
      error = job.communicate(timeout=120)[1]
      self.assertEqual(job.returncode, 128 + number, error)
      self.assertIn("is as it was", error)
      self.assertFalse(os.path.exists(os.path.join(FOLDER, "stopped")))
    os.remove(os.path.join(FOLDER, "large.safetensors"))

  def test_help(self):
    done = run("--help")
    self.assertEqual(done.returncode, 0)
    self.assertEqual(done.stderr, "")
    for line in done.stdout.splitlines():
      self.assertLessEqual(len(line), 88, line)
    for command in [line.split()[0] for line in done.stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()]:
      done = run(command, "--help")
      self.assertEqual(done.returncode, 0)
      self.assertIn("Usage: dsd %s" % command, done.stdout)
    nothing = run()
    self.assertEqual(nothing.returncode, 2)
    self.assertEqual(nothing.stdout, "")
    self.assertIn("Usage: dsd", nothing.stderr)


if __name__ == "__main__":
  DSD, EXAMPLE = (os.path.abspath(a) for a in sys.argv[1:3])
  FOLDER = tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR"))
  subprocess.run([EXAMPLE, FOLDER], check=True)
  unittest.main(argv=sys.argv[:1])
