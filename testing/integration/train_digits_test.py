#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs //examples:train_digits from beginning to end. Argument: the program, with raw dumps."""

import fcntl
import glob
import json
import os
import pty
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ranks  # noqa: E402

PROGRAM = os.path.abspath(sys.argv.pop(1))


class TrainDigitsTest(unittest.TestCase):

    def setUp(self):
        self.dir = tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.out = os.path.join(self.dir, "out")
        self.checkpoint = os.path.join(self.out, "checkpoint")

    def train(self, *args, **env):
        return ranks.run([PROGRAM, "--out", self.out, *args], env=ranks.clean_environment(**env))

    def record(self):
        with open(os.path.join(self.out, "train.json"), encoding="utf-8") as file:
            return json.load(file)

    def test_default_run_proves_itself(self):
        result = self.train()
        self.assertEqual(result.code, 0, result)
        for text in (
                "Training on 4 ranks", "Saved step 75 from 4 ranks", "; 0 elements of the optimizer's moments are zero",
                "Resuming on 2 ranks", "Loaded step 75 on 2 ranks", ": each once", "as at the save: equal bit for bit",
                "Continued: losses of steps 76 to 150 on 2 ranks", "dcp.load(state, checkpoint_id=path)",
                "The checkpoint is in " + self.checkpoint):
            self.assertIn(text, result.out)
        # The table: a row of one element lies on one rank.
        self.assertRegex(result.out, r"model\.fc1\.weight +float32 +\[130, 64\] +32\.5 KiB +4\n")
        self.assertRegex(result.out, r"optim\.state\.logit_scale\.exp_avg_sq +float32 +\[1\] +4 B +1\n")
        self.assertRegex(result.out, r"optim\.param_groups\.0\.betas +tuple +\(0\.9, 0\.999\)\n")
        self.assertNotIn("\r", result.out)
        accuracies = [float(a) for a in re.findall(r"held-out accuracy ([0-9.]+) %", result.out)]
        self.assertGreater(accuracies[-1], 90)
        losses = self.record()["losses"]
        self.assertEqual(len(losses), 150)
        self.assertLess(losses[-1], losses[0] / 5)
        worst = re.search(r"differ by ([^ ]+) at most", result.out)
        print("4 -> 2 ranks: losses differ by", worst.group(1), "at most")

    def test_same_number_of_ranks_goes_on_bit_for_bit(self):
        result = self.train("--ranks", "3", "--resume-ranks", "3", "--steps", "16")
        self.assertEqual(result.code, 0, result)
        self.assertRegex(result.out, r"differ by 0 at most from those of the first run on 3 \(equal bit for bit\)")

    def test_other_numbers_of_ranks(self):
        for first, second in ((1, 3), (3, 1), (2, 4)):
            result = self.train("--ranks", str(first), "--resume-ranks", str(second), "--steps", "10")
            self.assertEqual(result.code, 0, result)
            self.assertIn("as at the save: equal bit for bit", result.out)
            self.assertIn(": each once", result.out)

    def test_training_does_not_depend_on_the_number_of_ranks(self):
        """Initial values, order of the digits and gradients: up to the order of sums."""
        curves = []
        for count in ("1", "4"):
            result = self.train("--ranks", count, "--resume-ranks", "1", "--steps", "20")
            self.assertEqual(result.code, 0, result)
            curves.append(self.record()["losses"])
        worst = max(abs(a - b) for a, b in zip(*curves))
        print("1 and 4 ranks: losses differ by", worst, "at most")
        self.assertLess(worst, 1e-4)

    def test_a_flipped_byte_is_found(self):
        dumps = os.path.join(self.dir, "dumps")
        os.mkdir(dumps)
        result = self.train("--ranks", "2", "--steps", "8", "--save-step", "6", DUMP_DIR=dumps, DUMP_STEPS="6")
        self.assertEqual(result.code, 0, result)
        seed = int(os.environ.get("DSD_TEST_SEED") or random.randrange(1 << 32))
        print("DSD_TEST_SEED=%d" % seed)
        rng = random.Random(seed)
        files = glob.glob(os.path.join(self.checkpoint, "*.distcp"))
        contents = {}
        for path in files:
            with open(path, "rb") as file:
                contents[path] = file.read()
        with open(os.path.join(dumps, "step6.rank1.json"), encoding="utf-8") as file:
            tensors = json.load(file)["tensors"]
        with open(os.path.join(dumps, "step6.rank1.bin"), "rb") as file:
            values = file.read()
        for key in ("model.fc1.weight", "optim.state.fc2.weight.exp_avg_sq", "model.fc3.bias"):
            tensor = next(t for t in tensors if t["key"] == key)
            stored = values[tensor["offset"]:tensor["offset"] + tensor["bytes"]]
            places = [(path, data.find(stored)) for path, data in contents.items() if stored in data]
            self.assertEqual(len(places), 1, "%s of rank 1 is stored in %s" % (key, places))
            path, begin = places[0]
            position = begin + rng.randrange(len(stored))
            damaged = bytearray(contents[path])
            damaged[position] ^= 1 << rng.randrange(8)
            with open(path, "wb") as file:
                file.write(damaged)
            for resume_ranks in ("1", "3"):
                result = ranks.run([PROGRAM, "--resume", self.checkpoint, "--resume-ranks", resume_ranks, "--steps", "8"])
                self.assertEqual(result.code, 1, result)
                self.assertIn("DATA_LOSS", result.err)
                self.assertIn(key, result.err)
            with open(path, "wb") as file:
                file.write(contents[path])
        result = ranks.run([PROGRAM, "--resume", self.checkpoint, "--steps", "8"])
        self.assertEqual(result.code, 0, result)

    def test_live_state_is_compared_with_the_record(self):
        """The comparison does not rest on what the checkpoint says of itself."""
        result = self.train("--ranks", "2", "--steps", "4")
        self.assertEqual(result.code, 0, result)
        record = self.record()
        record["digests"]["model.fc2.bias"] = "%032x" % (int(record["digests"]["model.fc2.bias"], 16) ^ 1)
        with open(os.path.join(self.out, "train.json"), "w", encoding="utf-8") as file:
            json.dump(record, file)
        result = ranks.run([PROGRAM, "--resume", self.checkpoint, "--steps", "4"])
        self.assertEqual(result.code, 1, result)
        self.assertIn("not the state at the save; differing: model.fc2.bias", result.err)

    def test_as_ranks_of_a_launcher(self):
        command = [PROGRAM, "--out", self.out, "--steps", "8"]
        for result in ranks.run_ranks(command, 3):
            self.assertEqual(result.code, 0, result)
        results = ranks.run_ranks(command + ["--resume", self.checkpoint], 2)
        for result in results:
            self.assertEqual(result.code, 0, result)
        self.assertIn("Continued: losses of steps 5 to 8 on 2 ranks", results[0].out)
        self.assertEqual(results[1].out, "")

    def test_a_run_that_goes_on_after_the_first_has_nothing_to_compare(self):
        command = [PROGRAM, "--out", self.out, "--save-step", "4"]
        for result in ranks.run_ranks(command + ["--steps", "4"], 2):
            self.assertEqual(result.code, 0, result)
        result = ranks.run([PROGRAM, "--resume", self.checkpoint, "--steps", "6"])
        self.assertEqual(result.code, 0, result)
        self.assertIn("as at the save: equal bit for bit", result.out)
        self.assertIn("The first run ended at step 4: no losses to compare", result.out)
        self.assertNotIn("Continued", result.out)

    def test_on_a_narrow_terminal(self):
        """Each drawing of the progress line fits, so that the next one covers it."""
        columns = 30
        master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = subprocess.Popen(
            [PROGRAM, "--out", self.out, "--ranks", "1", "--resume-ranks", "1", "--steps", "4"],
            env=ranks.clean_environment(TERM="xterm"), stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal)
        os.close(terminal)
        output = b""
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            output += piece
        os.close(master)
        self.assertEqual(process.wait(), 0, output)
        drawn = re.findall(r"\r([^\r\n]*step [^\r\n]*)\x1b\[K", output.decode())
        self.assertEqual(len(drawn), 6, output)
        for line in drawn:
            self.assertLess(len(line), columns)

    def test_help_names_every_option(self):
        result = ranks.run([PROGRAM, "--help"])
        self.assertEqual(result.code, 0)
        for option in ("--ranks", "--resume-ranks", "--steps", "--save-step", "--out", "--resume", "--backend",
                       "--hidden", "--seed", "--data", "--timeout", "torchrun", "srun", "mpirun"):
            self.assertIn(option, result.out)


if __name__ == "__main__":
    ranks.main()
