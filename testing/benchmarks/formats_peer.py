# SPDX-License-Identifier: Apache-2.0
"""Python's side of formats_benchmark: safetensors and torch.save.

usage: formats_peer.py write|read PATH TENSORS ELEMENTS

Prints one line of JSON: the least seconds of three runs, and whether what was read is right. Element i of tensor t is
i + t.
"""

import json
import os
import sys
import time

import safetensors.torch
import torch

RUNS = 3


def least(prepare, work):
  best = None
  for _ in range(RUNS):
    prepare()
    cpu, wall = time.process_time(), time.monotonic()
    result = work()
    now = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    if best is None or now["wall"] < best["wall"]:
      best = now
  return best, result


def main():
  verb, path, tensors, elements = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
  torch.set_num_threads(1)
  expected = {"t%d" % t: (torch.arange(elements, dtype=torch.float32) + t).reshape(-1, 1024) for t in range(tensors)}
  is_archive = path.endswith(".pt")

  def remove():
    if os.path.exists(path):
      os.remove(path)

  def write():
    if is_archive:
      torch.save(expected, path)
    else:
      safetensors.torch.save_file(expected, path, {"format": "pt"})

  def write_durably():
    write()
    with open(path, "rb") as file:
      os.fsync(file.fileno())

  def read():
    return torch.load(path, weights_only=True) if is_archive else safetensors.torch.load_file(path)

  if verb == "write":
    durable, _ = least(remove, write_durably)
    plain, _ = least(remove, write)
    print(json.dumps({"write": plain, "durable": durable}))
  else:
    # A mapped file is not read before its elements are touched.
    result, loaded = least(lambda: None, lambda: {k: t.clone() for k, t in read().items()} if not is_archive else read())
    right = all(torch.equal(loaded[k], t) for k, t in expected.items()) and len(loaded) == tensors
    print(json.dumps({"read": result, "right": right}))


if __name__ == "__main__":
  main()
