# SPDX-License-Identifier: Apache-2.0
"""Runs //examples:train_digits as its users do: by itself, or as ranks of a launcher. And runs the tests of a file."""

import concurrent.futures
import os
import socket
import subprocess
import time
import unittest
import xml.etree.ElementTree as ElementTree

# Of a whole run; far more than it takes.
TIMEOUT_S = 240

LAUNCHER_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "TORCHELASTIC_", "DSD_")


class Result:
    """How one process ended."""

    def __init__(self, code, out, err):
        self.code = code
        self.out = out
        self.err = err

    def __str__(self):
        return "exit code %s\n--- stdout\n%s\n--- stderr\n%s" % (self.code, self.out, self.err)


def clean_environment(**variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    env.update(variables)
    return env


def run(command, env=None, cwd=None, **kwargs):
    """Runs one process to its end."""
    process = subprocess.run(
        command, env=env or clean_environment(), cwd=cwd, timeout=TIMEOUT_S, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False, **kwargs)
    return Result(process.returncode, process.stdout, process.stderr)


def run_ranks(command, world_size, present=None, port=None, cwds=None, extra_env=None):
    """Runs ranks of a launcher like torchrun, all at once; returns a Result for each of `present`.

    command: argv, or a function from the rank to it.
    present: the ranks that are started; all by default.
    port: MASTER_PORT; by default one that the kernel chose, whose socket rank 0 inherits.
    cwds: a working directory per rank.
    """
    listener = None
    if port is None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        port = listener.getsockname()[1]

    def run_one(rank):
        env = clean_environment(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", **(extra_env or {}))
        inherited = ()
        if listener is not None and rank == 0:
            env["DSD_LISTEN_FD"] = str(listener.fileno())
            inherited = (listener.fileno(),)
        argv = command(rank) if callable(command) else command
        return run(argv, env=env, cwd=cwds[rank] if cwds else None, pass_fds=inherited)

    ranks = list(range(world_size)) if present is None else present
    with concurrent.futures.ThreadPoolExecutor(len(ranks)) as pool:
        results = list(pool.map(run_one, ranks))
    if listener is not None:
        listener.close()
    return results


class _CasesResult(unittest.TextTestResult):
    """Also keeps each case for the result file that Bazel asks for: (test, seconds, tag, text)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cases = []
        self._began = 0.0

    def startTest(self, test):
        self._began = time.monotonic()
        super().startTest(test)

    def _keep(self, test, tag=None, text=""):
        self.cases.append((test, time.monotonic() - self._began, tag, text))

    def addSuccess(self, test):
        self._keep(test)
        super().addSuccess(test)

    def addFailure(self, test, err):
        self._keep(test, "failure", str(err[1]))
        super().addFailure(test, err)

    def addError(self, test, err):
        self._keep(test, "error", repr(err[1]))
        super().addError(test, err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self._keep(subtest, "failure", str(err[1]))
        super().addSubTest(test, subtest, err)

    def addSkip(self, test, reason):
        self._keep(test, "skipped", reason)
        super().addSkip(test, reason)


def main():
    """Runs the tests of the program's file and writes the result file of Bazel, case by case."""
    runner = unittest.TextTestRunner(verbosity=2, resultclass=_CasesResult)
    program = unittest.main(testRunner=runner, exit=False)
    path = os.environ.get("XML_OUTPUT_FILE")
    if path:
        suite = ElementTree.Element("testsuite", name="integration", tests=str(len(program.result.cases)))
        for test, seconds, tag, text in program.result.cases:
            case_class, _, name = test.id().rpartition(".")
            case = ElementTree.SubElement(
                suite, "testcase", classname=case_class.rpartition(".")[2], name=name, time="%.1f" % seconds)
            if tag is not None:
                printable = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
                ElementTree.SubElement(case, tag, message=printable)
        root = ElementTree.Element("testsuites")
        root.append(suite)
        ElementTree.ElementTree(root).write(path, encoding="utf-8")
    raise SystemExit(not program.result.wasSuccessful())
