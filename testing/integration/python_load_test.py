# SPDX-License-Identifier: Apache-2.0
"""Python opens what //examples:train_digits saved. Arguments: the program with raw dumps, the interpreter.

Compares with raw dumps of the live tensors, which were made without the code that names, moves and saves state.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import unittest

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ranks  # noqa: E402

PYTHON = os.path.abspath(sys.argv.pop(2))
PROGRAM = os.path.abspath(sys.argv.pop(1))
RANKS = 4
STEPS = 8
SAVE_STEP = 6
DTYPES = {"Float": torch.float32}


class Net(torch.nn.Module):
    """The classifier of the program."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.ones(1))
        self.fc1 = torch.nn.Linear(64, 130)
        self.fc2 = torch.nn.Linear(130, 66)
        self.fc3 = torch.nn.Linear(66, 10)

    def forward(self, x):
        x = torch.nn.functional.gelu(self.fc1(x))
        return self.fc3(torch.nn.functional.gelu(self.fc2(x))) * self.logit_scale


def read_dump(directory, step):
    """The dumps of all ranks put together: (tensors by key, the rest)."""
    parts = {}
    for rank in range(RANKS):
        path = os.path.join(directory, "step%d.rank%d" % (step, rank))
        with open(path + ".json", encoding="utf-8") as file:
            index = json.load(file)
        with open(path + ".bin", "rb") as file:
            data = file.read()
        for item in index.pop("tensors"):
            raw = bytearray(data[item["offset"]:item["offset"] + item["bytes"]])
            dtype = DTYPES[item["dtype"]]
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            parts.setdefault(item["key"], []).append(flat.reshape(item["shape"]))
        rest = index
    assert all(len(p) == RANKS for p in parts.values())
    return {key: torch.cat(p) for key, p in parts.items()}, rest


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def ulps(a, b):
    """The largest distance of two float32 tensors, in representable numbers between."""
    def ordered(t):
        i = t.view(torch.int32).to(torch.int64)
        return torch.where(i < 0, -(i & 0x7FFFFFFF), i)
    return (ordered(a) - ordered(b)).abs().max().item()


class PythonLoadTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)
        cls.dir = tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR"))
        cls.checkpoint = os.path.join(cls.dir, "out", "checkpoint")
        dumps = os.path.join(cls.dir, "dumps")
        os.mkdir(dumps)
        # Both runs have the same ranks: the second goes on bit for bit from the checkpoint.
        result = ranks.run(
            [PROGRAM, "--ranks", str(RANKS), "--resume-ranks", str(RANKS), "--out", os.path.join(cls.dir, "out"),
             "--steps", str(STEPS), "--save-step", str(SAVE_STEP)],
            env=ranks.clean_environment(DUMP_DIR=dumps, DUMP_STEPS="%d,%d" % (SAVE_STEP, SAVE_STEP + 1)))
        assert result.code == 0, result
        cls.output = result.out
        cls.saved, cls.rest = read_dump(dumps, SAVE_STEP)
        cls.next, _ = read_dump(dumps, SAVE_STEP + 1)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.dir, ignore_errors=True)

    def expected_tensors(self):
        expected = {k: v for k, v in self.saved.items() if not k.startswith("grad.")}
        for fqn, count in self.rest["optimizer_steps"].items():
            expected["optim.state.%s.step" % fqn] = torch.tensor(float(count))
        return expected

    def fresh(self, **kwargs):
        """A Python model and optimizer, and their state as dcp.load wants it."""
        model = Net()
        # Other values than those saved, all of them.
        options = dict(lr=0.5, betas=(0.1, 0.2), eps=1e-3, weight_decay=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), **options, **kwargs)
        model(torch.randn(3, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model_state, optimizer_state = dsd.get_state_dict(model, optimizer)
        return model, optimizer, {"model": model_state, "optim": optimizer_state, "step": -1}

    def load(self, **kwargs):
        model, optimizer, state = self.fresh(**kwargs)
        dcp.load(state, checkpoint_id=self.checkpoint)
        dsd.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        return model, optimizer, state

    def test_keys_are_those_that_python_would_write(self):
        index = dcp.FileSystemReader(self.checkpoint).read_metadata()
        flat, paths = flatten_state_dict(self.fresh()[2])
        self.assertEqual(set(index.state_dict_metadata), set(flat))
        self.assertEqual({k: tuple(v) for k, v in index.planner_data.items()}, {k: tuple(v) for k, v in paths.items()})

    def test_the_printed_lines_read_equal_bytes(self):
        lines = re.search(r"Open it in Python:\n\n((?:    .*\n)+)", self.output).group(1)
        variables = {}
        exec(textwrap.dedent(lines), variables)  # what a reader of the output would paste
        state = variables["state"]
        expected = self.expected_tensors()
        self.assertEqual(set(state), set(expected))
        for key, value in expected.items():
            self.assertTrue(same_bytes(state[key], value), key)

    def test_a_python_job_resumes(self):
        model, optimizer, state = self.load()
        self.assertEqual(state["step"], SAVE_STEP)
        expected = self.expected_tensors()
        for fqn, parameter in model.named_parameters():
            self.assertTrue(same_bytes(parameter.detach(), expected["model." + fqn]), fqn)
            for name, value in optimizer.state[parameter].items():
                self.assertTrue(same_bytes(value, expected["optim.state.%s.%s" % (fqn, name)]), (fqn, name))
        (group,) = optimizer.param_groups
        for name, value in self.rest["param_group"].items():
            self.assertEqual(list(group[name]) if name == "betas" else group[name], value, name)
        defaults = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
        for name in set(group) - set(self.rest["param_group"]) - {"params"}:
            self.assertEqual(group[name], defaults[name], name)
        self.assertEqual(state["optim"]["param_groups"][0]["params"], [fqn for fqn, _ in model.named_parameters()])

    def next_step(self, **kwargs):
        model, optimizer, _ = self.load(**kwargs)
        for fqn, parameter in model.named_parameters():
            parameter.grad = self.next["grad." + fqn].clone()
        return model, optimizer

    def test_the_next_step_in_python_equals_ours(self):
        """exp_avg_sq bit for bit. exp_avg: Python computes it as a lerp, LibTorch as a * b + c * d; each rounds otherwise."""
        for kwargs in (dict(foreach=False), dict(foreach=True)):
            model, optimizer = self.next_step(**kwargs)
            optimizer.step()
            worst_average = worst_parameter = 0
            for fqn, parameter in model.named_parameters():
                state = optimizer.state[parameter]
                self.assertEqual(state["step"].item(), SAVE_STEP + 1)
                ours = {k: self.next["optim.state.%s.%s" % (fqn, k)] for k in ("exp_avg", "exp_avg_sq")}
                self.assertTrue(same_bytes(state["exp_avg_sq"], ours["exp_avg_sq"]), fqn)
                worst_average = max(worst_average, ulps(state["exp_avg"], ours["exp_avg"]))
                worst_parameter = max(worst_parameter, ulps(parameter.detach(), self.next["model." + fqn]))
                # In units of the terms that are added, where they cancel.
                scale = torch.maximum(self.saved["optim.state.%s.exp_avg" % fqn].abs(), parameter.grad.abs())
                self.assertTrue(((state["exp_avg"] - ours["exp_avg"]).abs() <= 2 ** -23 * scale).all(), fqn)
                self.assertTrue(torch.allclose(parameter.detach(), self.next["model." + fqn], rtol=2 ** -22, atol=1e-8), fqn)
            print("%s: exp_avg differs by %d ulp at most, parameters by %d" % (kwargs, worst_average, worst_parameter))

    def test_the_next_step_with_the_same_formula_is_equal_bit_for_bit(self):
        model, optimizer = self.next_step()
        (group,) = optimizer.param_groups
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            for fqn, p in model.named_parameters():
                state = optimizer.state[p]
                step = int(state["step"].item()) + 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2 ** step) ** 0.5).add_(group["eps"])
                p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1 ** step))
                for name in ("exp_avg", "exp_avg_sq"):
                    self.assertTrue(same_bytes(state[name], self.next["optim.state.%s.%s" % (fqn, name)]), (fqn, name))
                self.assertTrue(same_bytes(p.detach(), self.next["model." + fqn]), fqn)

    def test_torchrun_starts_the_program(self):
        out = os.path.join(self.dir, "torchrun")
        command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        result = ranks.run(command + ["--nproc-per-node=3", PROGRAM, "--out", out, "--steps", "4"])
        self.assertEqual(result.code, 0, result)
        self.assertIn("Saved step 2 from 3 ranks", result.out)
        result = ranks.run(command + ["--nproc-per-node=2", PROGRAM, "--out", out, "--steps", "4", "--resume",
                                      os.path.join(out, "checkpoint")])
        self.assertEqual(result.code, 0, result)
        self.assertIn("Continued: losses of steps 3 to 4 on 2 ranks", result.out)


if __name__ == "__main__":
    ranks.main()
