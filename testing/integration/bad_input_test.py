#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What users, networks and disks do wrong: a clear error on every rank, exit code not 0, nothing half-written, and the
old checkpoint still loads. Argument: //examples:train_digits."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ranks  # noqa: E402

PROGRAM = os.path.abspath(sys.argv.pop(1))


class BadInputTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        """A good run, from which checkpoints are copied."""
        cls.root = tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR"))
        cls.good = os.path.join(cls.root, "good")
        result = ranks.run([PROGRAM, "--out", cls.good, "--ranks", "2", "--steps", "4"])
        assert result.code == 0, result

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.root, ignore_errors=True)

    def setUp(self):
        self.dir = tempfile.mkdtemp(dir=self.root)
        self.out = os.path.join(self.dir, "out")
        self.checkpoint = os.path.join(self.out, "checkpoint")

    def copy_good(self):
        shutil.copytree(self.good, self.out)

    def assert_all_fail(self, results, *texts, code=1):
        """Each rank ended with an error that has all texts, and not by a signal."""
        for rank, result in enumerate(results):
            self.assertEqual(result.code, code, "rank %d: %s" % (rank, result))
            for text in texts:
                self.assertIn(text, result.err, "rank %d" % rank)

    def assert_one_verdict(self, results, *texts):
        """The same, and the error is the same on every rank."""
        self.assert_all_fail(results, *texts)
        self.assertEqual(len({re.sub(r"rank \d+ of", "a rank of", result.err) for result in results}), 1,
                         "\n".join(str(result) for result in results))

    def assert_loads(self, checkpoint, steps="4"):
        result = ranks.run([PROGRAM, "--resume", checkpoint, "--resume-ranks", "1", "--steps", steps])
        self.assertEqual(result.code, 0, result)
        self.assertIn("as at the save: equal bit for bit", result.out)

    def resume(self, *args):
        return ranks.run_ranks([PROGRAM, "--resume", self.checkpoint, "--steps", "4", *args], 2)

    # Arguments and environment.

    def test_backend_that_is_not_linked(self):
        command = [PROGRAM, "--out", self.out, "--backend", "carrier_pigeon", "--steps", "4"]
        results = [ranks.run(command)] + ranks.run_ranks(command, 2)
        self.assert_all_fail(results, 'no backend "carrier_pigeon" is linked', "add //backends/carrier_pigeon to deps",
                             code=2)
        self.assertFalse(os.path.exists(self.checkpoint))

    def test_unknown_option_and_bad_values(self):
        for args in (["--rank", "2"], ["--ranks", "0"], ["--steps", "many"], ["--save-step", "9", "--steps", "4"],
                     ["--save-step", "4", "--steps", "4"], ["--hidden", "3,x"], ["--timeout", "nan"], ["--steps", "1"],
                     ["--seed", "-1"], ["--seed", "18446744073709551616"], ["--seed", "1e30"], ["--seed", "x"],
                     ["--resume", ""], ["--out", ""]):
            result = ranks.run([PROGRAM, *args, *([] if "--out" in args else ["--out", self.out])])
            self.assertEqual(result.code, 2, args)
            self.assertIn(args[0], result.err, args)
            self.assertFalse(os.path.exists(self.out), args)

    def test_environment_that_is_wrong(self):
        """Exit code 2, as for arguments, wherever it is noticed: before anything starts, or by the ranks."""
        many = {"RANK": "0", "WORLD_SIZE": "101", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        for variables, text in (
                ({"RANK": "1"}, "WORLD_SIZE"),
                ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is \"2\", expected a number from 0 to 1"),
                (many, "world of 101 ranks, expected at most 100"),
                ({"DSD_HEARTBEAT_SECONDS": "x"}, "DSD_HEARTBEAT_SECONDS"),
                ({"DSD_TOKEN": "short"}, "4 of 4 ranks failed")):
            result = ranks.run([PROGRAM, "--out", self.out], env=ranks.clean_environment(**variables))
            self.assert_all_fail([result], text, code=2)
        results = ranks.run_ranks([PROGRAM, "--out", self.out, "--steps", "4"], 2, extra_env={"DSD_TOKEN": "short"})
        self.assert_all_fail(results, "token", code=2)
        self.assertFalse(os.path.exists(self.checkpoint))

    def test_ranks_under_a_launcher(self):
        results = ranks.run_ranks([PROGRAM, "--out", self.out, "--ranks", "2"], 2)
        self.assert_all_fail(results, "--ranks", code=2)

    def test_data_that_is_not_there(self):
        self.assert_one_verdict(
            ranks.run_ranks([PROGRAM, "--out", self.out, "--data", self.dir + "/none.csv"], 2), "NOT_FOUND", "none.csv")

    def test_data_that_one_rank_lacks(self):
        def command(rank):
            return [PROGRAM, "--out", self.out, "--steps", "4"] + (["--data", self.dir + "/none.csv"] if rank else [])

        self.assert_one_verdict(ranks.run_ranks(command, 2), "NOT_FOUND", "none.csv")

    # The network.

    def test_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            results = ranks.run_ranks([PROGRAM, "--out", self.out, "--timeout", "5", "--steps", "4"], 2, port=port)
        self.assert_all_fail(results, str(port))
        self.assertIn("MASTER_PORT", results[0].err)

    def test_a_rank_that_never_arrives(self):
        begin = time.monotonic()
        results = ranks.run_ranks(
            [PROGRAM, "--out", self.out, "--timeout", "5", "--steps", "4"], 3, present=[0, 2])
        self.assert_all_fail(results, "rank 1")
        self.assertLess(time.monotonic() - begin, 60)

    def test_a_rank_that_is_killed(self):
        """The others end by themselves and name it, and so does the program that started them."""
        process = subprocess.Popen(
            [PROGRAM, "--out", self.out, "--ranks", "3", "--steps", "1000000", "--save-step", "2"],
            env=ranks.clean_environment(), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        try:
            deadline = time.monotonic() + ranks.TIMEOUT_S
            while not os.path.exists(os.path.join(self.checkpoint, ".metadata")):
                self.assertIsNone(process.poll(), "it ended before it saved")
                self.assertLess(time.monotonic(), deadline, "it did not save")
                time.sleep(0.05)
            with open("/proc/%d/task/%d/children" % (process.pid, process.pid), encoding="ascii") as file:
                children = [int(pid) for pid in file.read().split()]
            victim = None
            for pid in children:
                with open("/proc/%d/environ" % pid, "rb") as file:
                    if b"RANK=1" in file.read().split(b"\0"):
                        victim = pid
            os.kill(victim, signal.SIGKILL)
            _, err = process.communicate(timeout=ranks.TIMEOUT_S)
        finally:
            process.kill()
        self.assertEqual(process.returncode, 1, err)
        self.assertIn("rank 1 was killed by signal 9", err)
        for survivor in (0, 2):
            own = [line for line in err.splitlines() if "rank %d of 3:" % survivor in line]
            self.assertTrue(any("rank 1" in line for line in own), err)
        result = ranks.run([PROGRAM, "--resume", self.checkpoint, "--resume-ranks", "2", "--steps", "4"])
        self.assertEqual(result.code, 0, result)

    # Checkpoints.

    def test_checkpoint_that_is_not_there(self):
        self.assert_one_verdict(self.resume(), "NOT_FOUND", self.checkpoint)

    def test_checkpoint_without_its_index(self):
        self.copy_good()
        os.remove(os.path.join(self.checkpoint, ".metadata"))
        self.assert_one_verdict(self.resume(), "NOT_FOUND", ".metadata")

    def test_checkpoint_that_lacks_a_file(self):
        self.copy_good()
        victim = sorted(n for n in os.listdir(self.checkpoint) if n.endswith(".distcp"))[0]
        os.remove(os.path.join(self.checkpoint, victim))
        self.assert_one_verdict(self.resume(), victim)

    def test_checkpoint_that_was_cut_off(self):
        self.copy_good()
        victim = sorted(n for n in os.listdir(self.checkpoint) if n.endswith(".distcp"))[0]
        path = os.path.join(self.checkpoint, victim)
        os.truncate(path, os.path.getsize(path) // 2)
        self.assert_one_verdict(self.resume(), victim)

    def test_shapes_that_differ_are_all_listed(self):
        self.copy_good()
        self.assert_one_verdict(
            self.resume("--hidden", "120,66"), "model.fc1.weight", "[130, 64]", "[120, 64]", "model.fc1.bias",
            "model.fc2.weight", "[66, 130]", "[66, 120]")
        self.assert_loads(self.checkpoint)

    def test_missing_and_unexpected_keys_are_all_listed(self):
        self.copy_good()
        # Fewer layers: fc3 is unexpected, fc2 has another shape. More: fc4 is missing.
        self.assert_one_verdict(self.resume("--hidden", "130"), "model.fc3.weight", "model.fc3.bias", "model.fc2.weight")
        self.assert_one_verdict(self.resume("--hidden", "130,66,10"), "model.fc4.weight", "model.fc4.bias")
        self.assert_loads(self.checkpoint)

    def test_checkpoint_of_something_else(self):
        os.makedirs(self.checkpoint)
        with open(os.path.join(self.checkpoint, ".metadata"), "wb") as file:
            file.write(b"not a pickle")
        self.assert_one_verdict(self.resume(), "DATA_LOSS", ".metadata")

    # Disks.

    def data_files(self):
        return sorted(os.listdir(self.checkpoint))

    def test_files_must_not_grow(self):
        """Quotas and limits look like a full disk."""
        self.copy_good()
        before = self.data_files()

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))

        result = ranks.run(
            [PROGRAM, "--out", self.out, "--ranks", "2", "--steps", "4", "--seed", "5"], preexec_fn=limit)
        self.assert_all_fail([result], "RESOURCE_EXHAUSTED", "rank 0 of 2:", "rank 1 of 2:", self.checkpoint)
        self.assertEqual(self.data_files(), before)
        self.assert_loads(self.checkpoint)

    def test_full_disk(self):
        """A file system of its own, filled up after a first good run."""
        disk = os.path.join(self.dir, "disk")
        os.mkdir(disk)
        namespace = ["unshare", "--user", "--map-root-user", "--mount"]
        probe = ranks.run(namespace + ["mount", "-t", "tmpfs", "-o", "size=2M", "none", disk])
        if probe.code != 0:
            self.skipTest("cannot mount a small file system: " + probe.err.strip())
        script = """
            mount -t tmpfs -o size=2M none "$2" || exit 9
            run() { "$1" --out "$2/out" --ranks 2 --resume-ranks 1 --steps 4 --seed "$3"; }
            run "$1" "$2" 1 || exit 8
            ls -A "$2/out/checkpoint" > "$2/before"
            dd if=/dev/zero of="$2/filler" bs=4k 2> /dev/null
            dd if=/dev/zero of="$2/filler" bs=4k count=1 seek=$(($(stat -c %s "$2/filler") / 4096 - 20)) \
                conv=notrunc 2> /dev/null
            truncate -s -40k "$2/filler"
            run "$1" "$2" 2
            echo "code: $?"
            rm "$2/filler"
            ls -A "$2/out/checkpoint" | cmp - "$2/before" || exit 7
            "$1" --resume "$2/out/checkpoint" --resume-ranks 2 --steps 4
        """
        result = ranks.run(namespace + ["sh", "-c", script, "sh", PROGRAM, disk])
        self.assertEqual(result.code, 0, result)
        self.assertIn("code: 1", result.out)
        for text in ("RESOURCE_EXHAUSTED", "rank 0 of 2:", "rank 1 of 2:"):
            self.assertIn(text, result.err)
        self.assertIn("as at the save: equal bit for bit", result.out.split("code: 1")[1])

    def test_directory_that_rank_0_cannot_see(self):
        """The same relative path on every rank, but each has a disk of its own."""
        cwds = []
        for rank in range(2):
            cwds.append(os.path.join(self.dir, "node%d" % rank))
            os.mkdir(cwds[-1])
        results = ranks.run_ranks([PROGRAM, "--out", "out", "--steps", "4"], 2, cwds=cwds)
        self.assert_one_verdict(results, "rank 1", "checkpoint")
        for cwd in cwds:
            self.assertFalse(os.path.exists(os.path.join(cwd, "out", "checkpoint", ".metadata")))

    def test_output_that_cannot_be_written(self):
        with open("/dev/full", "w", encoding="ascii") as full:
            process = subprocess.run(
                [PROGRAM, "--resume", os.path.join(self.good, "checkpoint"), "--resume-ranks", "1", "--steps", "4"],
                env=ranks.clean_environment(), timeout=ranks.TIMEOUT_S, text=True, stdin=subprocess.DEVNULL, stdout=full,
                stderr=subprocess.PIPE, check=False)
        self.assertEqual(process.returncode, 1, process.stderr)
        self.assertIn("the output could not be written", process.stderr)

    def test_output_that_is_closed(self):
        """Else the report would go into the first file or connection that is opened."""
        closed = ["sh", "-c", 'exec "$@" >&-', "sh", PROGRAM]
        for args in (["--out", self.out, "--ranks", "2", "--steps", "4"], ["--help"]):
            result = ranks.run(closed + args)
            self.assert_all_fail([result], "standard output is closed")
            self.assertFalse(os.path.exists(self.out))
        # Under a launcher rank 0 reports, and its error is everybody's.
        command = ["--out", self.out, "--steps", "4"]
        self.assert_one_verdict(ranks.run_ranks(closed + command, 2), "standard output is closed")
        self.assertFalse(os.path.exists(self.checkpoint))
        result = ranks.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", PROGRAM] + command)
        self.assertEqual(result.code, 1, result)
        # Who has nothing to report needs no output.
        for result in ranks.run_ranks(lambda rank: (closed if rank else [PROGRAM]) + command, 2):
            self.assertEqual(result.code, 0, result)

    def test_record_that_cannot_be_written(self):
        """The error says why."""
        os.makedirs(os.path.join(self.out, "train.json", "in the way"))
        result = ranks.run([PROGRAM, "--out", self.out, "--ranks", "1", "--steps", "4"])
        self.assert_all_fail([result], os.path.join(self.out, "train.json"), "directory")

    def test_directory_that_cannot_be_made(self):
        with open(self.out, "w", encoding="ascii"):
            pass
        result = ranks.run([PROGRAM, "--out", self.out, "--ranks", "2", "--steps", "4"])
        self.assert_all_fail([result], "rank 0 of 2:", "rank 1 of 2:", self.out)


if __name__ == "__main__":
    ranks.main()
