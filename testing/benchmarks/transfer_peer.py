# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of transfer_benchmark, on two ranks.

usage: transfer_peer.py gather|spread COUNT ROWS

Prints one line of JSON: seconds of the first and of the fastest run, how much
memory grew, and digests of the results of each rank.
"""

import json
import os
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
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

RANKS = 2
RUNS = 3
COLUMNS = 2048


def rows(index, begin, end):
    values = torch.arange(begin * COLUMNS, end * COLUMNS, dtype=torch.float32)
    return values.remainder_(1021).add_(index).view(end - begin, COLUMNS)


def memory_mib(field):
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    raise RuntimeError(field)


def timed(work):
    out = {"grown_mib": 0.0}
    for run in range(RUNS):
        dist.barrier()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
            refs.write("5")
        before = memory_mib("VmRSS")
        start = time.monotonic()
        work()
        seconds = time.monotonic() - start
        out["grown_mib"] = max(out["grown_mib"], memory_mib("VmHWM") - before)
        out.setdefault("first", seconds)
        out["least"] = min(out.get("least", seconds), seconds)
    return out


def run_rank(rank, what, count, total_rows, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store",
                            rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    part = total_rows // RANKS
    model = torch.nn.Module()
    for i in range(count):
        local = (rows(i, rank * part, (rank + 1) * part) if what == "gather"
                 else torch.zeros(part, COLUMNS))
        shard = DTensor.from_local(local, mesh, [Shard(0)])
        model.register_parameter(f"p{i}", torch.nn.Parameter(shard))
    crc = 0
    if what == "gather":
        result = {}

        def work():
            result.clear()
            result.update(get_model_state_dict(
                model, options=StateDictOptions(full_state_dict=True)))

        out = timed(work)
        for value in result.values():
            crc = zlib.crc32(value.numpy().data, crc)
    else:
        whole = {f"p{i}": rows(i, 0, total_rows)
                 for i in range(count)} if rank == 0 else {}
        options = StateDictOptions(full_state_dict=True,
                                   broadcast_from_rank0=True)
        out = timed(lambda: set_model_state_dict(model, dict(whole),
                                                 options=options))
        for value in model.parameters():
            crc = zlib.crc32(value.detach().to_local().numpy().data, crc)
    out["digest"] = crc
    with open(f"{folder}/{rank}", "w", encoding="utf-8") as file:
        json.dump(out, file)
    dist.barrier()
    # Without this, gloo's threads sometimes abort the process at its end.
    os._exit(0)


def main():
    what, count, total_rows = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (what, int(count), int(total_rows), folder),
                 nprocs=RANKS)
        ranks = []
        for rank in range(RANKS):
            with open(f"{folder}/{rank}", encoding="utf-8") as file:
                ranks.append(json.load(file))
    out = {name: max(r[name] for r in ranks)
           for name in ("first", "least", "grown_mib")}
    out["digests"] = [r["digest"] for r in ranks]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
