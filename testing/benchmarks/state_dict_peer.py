# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of state_dict_benchmark.

usage: state_dict_peer.py local LAYERS EXPERTS [--set]
       state_dict_peer.py gather WORLD_SIZE LAYERS EXPERTS RUNS

Prints one line of JSON: measured seconds (wall and CPU, of all ranks together)
by name, those of the run with the least wall, and digests of the results.
"""

import json
import os
import resource
import struct
import sys
import tempfile
import time
import zlib

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

NAMES = ("down", "gate", "up")


class Expert(torch.nn.Module):
    def __init__(self, make, first):
        super().__init__()
        for i, name in enumerate(NAMES):
            self.register_parameter(name, torch.nn.Parameter(make(first + i)))


class Model(torch.nn.Module):
    def __init__(self, layers, experts, make):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(
                Expert(make, 3 * (layer * experts + expert))
                for expert in range(experts))
            for layer in range(layers))


def numbers(index, plus):
    """The four elements of parameter `index`."""
    return torch.tensor([index % 1024 + plus + e / 4 for e in range(4)])


def build(layers, experts, step, distribute=lambda tensor: tensor):
    """A model with the state of AdamW after `step` steps; 0: all zeros."""
    scale = 1 if step else 0
    model = Model(layers, experts,
                  lambda i: distribute(numbers(i, 0) * scale))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5 if step else 0.1)
    for i, p in enumerate(model.parameters()):
        optimizer.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": distribute(numbers(i, 1) * scale),
            "exp_avg_sq": distribute(numbers(i, 2) * scale),
        }
    return model, optimizer


def digest(model_dict, optimizer_dict):
    crc = 0
    for name, value in model_dict.items():
        crc = zlib.crc32(value.detach().numpy().tobytes(),
                         zlib.crc32(name.encode(), crc))
    for name, state in optimizer_dict["state"].items():
        for entry, value in state.items():
            crc = zlib.crc32(value.detach().numpy().tobytes(),
                             zlib.crc32(f"{name}.{entry}".encode(), crc))
    for group in optimizer_dict["param_groups"]:
        crc = zlib.crc32(struct.pack("<d", group["lr"]), crc)
        for name in group["params"]:
            crc = zlib.crc32(name.encode(), crc)
    return crc


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Timer:
    def __enter__(self):
        self.cpu = cpu_seconds()
        self.wall = time.monotonic()
        return self

    def __exit__(self, *unused):
        self.wall = time.monotonic() - self.wall
        self.cpu = cpu_seconds() - self.cpu

    def result(self):
        return {"wall": self.wall, "cpu": self.cpu}


def local(layers, experts, with_set):
    model, optimizer = build(layers, experts, step=1)
    out = {}
    with Timer() as timer:
        state = get_state_dict(model, optimizer)
    out["first get"] = timer.result()
    with Timer() as timer:
        state = get_state_dict(model, optimizer)
    out["second get"] = timer.result()
    out["digest"] = digest(*state)
    if with_set:
        other, other_optimizer = build(layers, experts, step=0)
        with Timer() as timer:
            set_state_dict(other, other_optimizer, model_state_dict=state[0],
                           optim_state_dict=state[1])
        out["set"] = timer.result()
        out["set digest"] = digest(*get_state_dict(other, other_optimizer))
    return out


def gather_rank(rank, world_size, layers, experts, runs, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank,
        world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    model, optimizer = build(
        layers, experts, 1,
        lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    options = StateDictOptions(full_state_dict=True)
    out = {}

    def measure(name, body):
        dist.barrier()
        with Timer() as timer:
            result = body()
        now = timer.result()
        out[name] = min(out.get(name, now), now, key=lambda r: r["wall"])
        return result

    for _ in range(runs):
        model_dict = measure(
            "gather of the model",
            lambda: get_model_state_dict(model, options=options))
        optimizer_dict = measure(
            "gather of the optimizer",
            lambda: get_optimizer_state_dict(model, optimizer,
                                             options=options))
    out["digest"] = digest(model_dict, optimizer_dict)
    with open(f"{folder}/{rank}", "w", encoding="utf-8") as file:
        json.dump(out, file)
    dist.barrier()
    # Without this, gloo's threads sometimes abort the process at its end.
    os._exit(0)


def gather(world_size, layers, experts, runs):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(gather_rank, (world_size, layers, experts, runs, folder),
                 nprocs=world_size)
        ranks = []
        for rank in range(world_size):
            with open(f"{folder}/{rank}", encoding="utf-8") as file:
                ranks.append(json.load(file))
    out = {"digest": ranks[0]["digest"]}
    assert all(r["digest"] == out["digest"] for r in ranks)
    for name in ("gather of the model", "gather of the optimizer"):
        out[name] = {
            "wall": max(r[name]["wall"] for r in ranks),
            "cpu": sum(r[name]["cpu"] for r in ranks),
        }
    return out


def main():
    what, *rest = sys.argv[1:]
    with_set = "--set" in rest
    sizes = [int(a) for a in rest if a != "--set"]
    out = local(*sizes, with_set) if what == "local" else gather(*sizes)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
