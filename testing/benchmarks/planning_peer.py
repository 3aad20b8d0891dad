# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of planning_benchmark: de-duplication, plan and validation of a save.

usage: planning_peer.py TENSORS RANKS

Each tensor is cut into one chunk per rank. Prints one line of JSON: measured seconds and what came out.
"""

import json
import resource
import sys
import time

import torch
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import (
    _validate_global_plan,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

ROWS, COLUMNS = 4, 64


class Timer:

  def __enter__(self):
    self.cpu = time.process_time()
    self.wall = time.monotonic()
    return self

  def __exit__(self, *unused):
    self.result = {"wall": time.monotonic() - self.wall, "cpu": time.process_time() - self.cpu}


def main():
  tensors, ranks = (int(word) for word in sys.argv[1:])
  size = torch.Size([ROWS * ranks, COLUMNS])
  properties = TensorProperties(dtype=torch.float32)
  plans = []
  for rank in range(ranks):
    chunk = ChunkStorageMetadata(offsets=torch.Size([ROWS * rank, 0]), sizes=torch.Size([ROWS, COLUMNS]))
    data = TensorWriteData(chunk=chunk, properties=properties, size=size)
    plans.append(
        SavePlan([
            WriteItem(
                index=MetadataIndex("layers.%d.weight" % i, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)
            for i in range(tensors)
        ]))
  out = {"start_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
  with Timer() as timer:
    plans = dedup_save_plans(plans)
  out["dedup"] = timer.result
  with Timer() as timer:
    plans, metadata = create_default_global_save_plan(plans)
  out["plan"] = timer.result
  with Timer() as timer:
    out["valid"] = _validate_global_plan(plans, metadata)
  out["validate"] = timer.result
  out["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  out["items"] = sum(len(plan.items) for plan in plans)
  out["elements"] = sum(
      chunk.sizes.numel() for value in metadata.state_dict_metadata.values() for chunk in value.chunks)
  print(json.dumps(out))


if __name__ == "__main__":
  main()
