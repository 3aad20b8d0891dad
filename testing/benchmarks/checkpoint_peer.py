# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of checkpoint_benchmark.

usage: checkpoint_peer.py metadata DIRECTORY TENSORS CHUNKS
       checkpoint_peer.py save DIRECTORY TENSORS ELEMENTS
       checkpoint_peer.py load DIRECTORY TENSORS ELEMENTS
       checkpoint_peer.py reshard DIRECTORY RANKS TENSORS ROWS COLUMNS

Prints one line of JSON: measured seconds and what came out. `metadata` writes an index and reads it, and then the one that
is in DIRECTORY/dsd. `load` and `reshard` read what dsd saved: the files of both are alike.
"""

import json
import os
import pickle
import resource
import sys
import tempfile
import time
import zlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh


class Timer:

  def __enter__(self):
    self.cpu = time.process_time()
    self.wall = time.monotonic()
    return self

  def __exit__(self, *unused):
    self.result = {"wall": time.monotonic() - self.wall, "cpu": time.process_time() - self.cpu}


def rss_mib():
  with open("/proc/self/statm", encoding="ascii") as statm:
    return int(statm.read().split()[1]) * resource.getpagesize() / (1 << 20)


def metadata(directory, tensors, chunks):
  properties = TensorProperties(dtype=torch.bfloat16)
  entries, storage, paths = {}, {}, {}
  for t in range(tensors):
    key = "model.layers.%d.weight" % t
    offsets = [torch.Size([16 * c, 0]) for c in range(chunks)]
    sizes = torch.Size([16, 1024])
    entries[key] = TensorStorageMetadata(
        properties=properties, size=torch.Size([16 * chunks, 1024]),
        chunks=[ChunkStorageMetadata(offsets=o, sizes=sizes) for o in offsets])
    paths[key] = ("model", key[6:])
    for c, offset in enumerate(offsets):
      storage[MetadataIndex(key, offset, c)] = _StorageInfo("__%d_0.distcp" % c, t * 40000, 34000)
  index = Metadata(entries, paths, storage, StorageMeta(save_id="id"), version="1.0.0")
  path = os.path.join(directory, "torch")
  out = {}
  with Timer() as timer:
    with open(path, "wb") as file:
      pickle.dump(index, file)
  out["write"] = timer.result
  out["bytes"] = os.path.getsize(path)
  del index, entries, storage, paths
  for name in ("torch", "dsd"):
    before = rss_mib()
    with Timer() as timer:
      with open(os.path.join(directory, name), "rb") as file:
        index = pickle.load(file)
    out["read_" + name] = timer.result
    out["read_%s_mib" % name] = rss_mib() - before
    out["chunks_" + name] = sum(len(entry.chunks) for entry in index.state_dict_metadata.values())
    out["stored_" + name] = len(index.storage_data)
    del index
  return out


def numbers(tensor, elements):
  return torch.arange(elements, dtype=torch.float32).add_(tensor)


def save(directory, tensors, elements):
  state = {"t%d" % t: numbers(t, elements) for t in range(tensors)}
  with Timer() as timer:
    dcp.save(state, checkpoint_id=directory, no_dist=True)
  return timer.result


def load(directory, tensors, elements):
  state = {"t%d" % t: torch.zeros(elements) for t in range(tensors)}
  with Timer() as timer:
    dcp.load(state, checkpoint_id=directory, no_dist=True)
  timer.result["right"] = all(torch.equal(state["t%d" % t], numbers(t, elements)) for t in range(tensors))
  return timer.result


def reshard_rank(rank, directory, ranks, tensors, rows, columns, meeting, out):
  torch.set_num_threads(1)
  dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=ranks)
  mesh = init_device_mesh("cpu", (ranks,))
  state = {"t%d" % t: distribute_tensor(torch.zeros(rows, columns), mesh, [Shard(0)]) for t in range(tensors)}
  dist.barrier()
  with Timer() as timer:
    dcp.load(state, checkpoint_id=directory)
    dist.barrier()
  right = True
  begin = rank * rows // ranks * columns
  for t in range(tensors):
    local = state["t%d" % t].to_local()
    expected = torch.arange(begin, begin + local.numel(), dtype=torch.float32).add_(t).view_as(local)
    right &= torch.equal(local, expected)
  with open("%s.%d" % (out, rank), "w", encoding="ascii") as file:
    json.dump({**timer.result, "right": bool(right)}, file)
  dist.barrier()
  os._exit(0)


def reshard(directory, ranks, tensors, rows, columns):
  folder = tempfile.mkdtemp()
  out = os.path.join(folder, "out")
  mp.start_processes(
      reshard_rank, (directory, ranks, tensors, rows, columns, os.path.join(folder, "meeting"), out), nprocs=ranks,
      start_method="spawn")
  results = []
  for rank in range(ranks):
    with open("%s.%d" % (out, rank), encoding="ascii") as file:
      results.append(json.load(file))
  return {
      "wall": max(r["wall"] for r in results),
      "cpu": sum(r["cpu"] for r in results),
      "right": all(r["right"] for r in results)
  }


def main():
  torch.set_num_threads(1)
  work = {"metadata": metadata, "save": save, "load": load, "reshard": reshard}[sys.argv[1]]
  print(json.dumps(work(sys.argv[2], *(int(word) for word in sys.argv[3:]))))


if __name__ == "__main__":
  main()
