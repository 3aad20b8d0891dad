# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of job_benchmark: the same as small_job.cc.

usage: small_job_peer.py DIRECTORY LAYERS
"""

import math
import struct
import sys
import zlib

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def numbers(shape, start):
  return torch.arange(start, start + math.prod(shape), dtype=torch.float32).view(shape)


def build(layers, filled):
  model = torch.nn.Module()
  for i in range(layers):
    model.add_module("layer%d" % i, torch.nn.Linear(64, 64))
  optimizer = torch.optim.AdamW(model.parameters(), lr=0.5 if filled else 0.1)
  scale = 1 if filled else 0
  for i, param in enumerate(model.parameters()):
    param.data.copy_(numbers(param.shape, 3 * i)).mul_(scale)
    optimizer.state[param] = {
        "step": torch.tensor(float(scale)),
        "exp_avg": numbers(param.shape, 3 * i + 1).mul_(scale),
        "exp_avg_sq": numbers(param.shape, 3 * i + 2).mul_(scale),
    }
  return model, optimizer


def state_of(model, optimizer):
  model_dict, optimizer_dict = get_state_dict(model, optimizer)
  return {"model": model_dict, "optim": optimizer_dict}


def main():
  torch.set_num_threads(1)
  directory, layers = sys.argv[1], int(sys.argv[2])
  dcp.save(state_of(*build(layers, True)), checkpoint_id=directory)
  model, optimizer = build(layers, False)
  state = state_of(model, optimizer)
  dcp.load(state, checkpoint_id=directory)
  set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
  crc = 0
  for param in model.parameters():
    for tensor in (param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]):
      crc = zlib.crc32(tensor.numpy().tobytes(), crc)
  print(zlib.crc32(struct.pack("<d", optimizer.param_groups[0]["lr"]), crc))


if __name__ == "__main__":
  main()
