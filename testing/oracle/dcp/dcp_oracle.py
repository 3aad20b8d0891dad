# SPDX-License-Identifier: Apache-2.0
"""The Python side of interop_test: writes checkpoints with torch.distributed.checkpoint, and reads those of dsd.

    dcp_oracle.py write FOLDER    makes FOLDER/<case>/, and FOLDER/<case>.dump/ with what each case holds
    dcp_oracle.py check FOLDER    compares FOLDER/ckpt/ with FOLDER/ckpt.dump/, by all ways that Python has
    dcp_oracle.py dtypes FOLDER   writes the names of all dtypes to FOLDER/dtypes.txt

Runs with torch 2.2 and newer; what a version older than the one that is linked cannot write is left out.

A dump is written without any checkpoint code: index.txt has a line per tensor, "key<TAB>dtype<TAB>extents<TAB>file", the
files the elements, row-major.
"""

import collections
import ctypes
import inspect
import io
import os
import subprocess
import sys
import tempfile
import types
import zipfile


class ZstdCompressor:
  """The part of the package zstandard that torch uses, over the system's library: the package is not needed for it."""

  class Writer(io.RawIOBase):

    def __init__(self, output):
      self.output, self.data = output, b""

    def writable(self):
      return True

    def write(self, data):
      self.data += bytes(data)
      return len(bytes(data))

    def close(self):
      if not self.closed and self.data:
        zstd = ctypes.CDLL("libzstd.so.1")
        zstd.ZSTD_compressBound.restype = zstd.ZSTD_compress.restype = ctypes.c_size_t
        room = zstd.ZSTD_compressBound(ctypes.c_size_t(len(self.data)))
        packed = ctypes.create_string_buffer(room)
        size = zstd.ZSTD_compress(packed, ctypes.c_size_t(room), self.data, ctypes.c_size_t(len(self.data)), 3)
        self.output.write(packed.raw[:size])
        self.data = b""
      super().close()

  def stream_writer(self, output):
    return self.Writer(output)


zstandard = types.ModuleType("zstandard")
zstandard.ZstdCompressor = ZstdCompressor
sys.modules["zstandard"] = zstandard

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

IS_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)


def supported(function, *names):
  """Whether a function has parameters of these names; only an old one may lack them."""
  has_all = set(names) <= set(inspect.signature(function).parameters)
  assert has_all or IS_OLD, names
  return has_all


ALONE = {"no_dist": True} if supported(dcp.save, "no_dist") else {}

DTYPES = [
    "float32", "float64", "float16", "bfloat16", "complex32", "complex64", "complex128", "int8", "int16", "int32",
    "int64", "uint8", "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"
]


def storable(dtype):
  try:
    torch.save(torch.zeros(16, dtype=torch.uint8).view(getattr(torch, dtype)), io.BytesIO())
    return True
  except (AttributeError, KeyError):
    assert IS_OLD, dtype
    return False


DTYPES = [d for d in DTYPES if storable(d)]


def tensor_of(data, dtype, shape):
  flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
  return flat.view(getattr(torch, dtype)).reshape(shape)


def bytes_of(tensor):
  flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
  return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def filled(dtype, shape, seed):
  """Random elements; bytes of 0 and 1 only, which every dtype can have."""
  generator = torch.Generator().manual_seed(seed)
  size = getattr(torch, dtype).itemsize
  count = size
  for extent in shape:
    count *= extent
  data = torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8)
  return tensor_of(data.numpy().tobytes(), dtype, shape)


def dump(folder, tensors):
  os.makedirs(folder)
  with open(os.path.join(folder, "index.txt"), "w", encoding="utf-8") as index:
    for number, (key, tensor) in enumerate(sorted(tensors.items())):
      dtype = str(tensor.dtype).removeprefix("torch.")
      index.write("%s\t%s\t%s\t%d\n" % (key, dtype, ",".join(map(str, tensor.shape)), number))
      with open(os.path.join(folder, str(number)), "wb") as out:
        out.write(bytes_of(tensor))


def read_dump(folder):
  tensors = {}
  with open(os.path.join(folder, "index.txt"), encoding="utf-8") as index:
    for line in index:
      key, dtype, shape, name = line.rstrip("\n").split("\t")
      with open(os.path.join(folder, name), "rb") as data:
        tensors[key] = tensor_of(data.read(), dtype, [int(e) for e in shape.split(",") if e])
  return tensors


def objects():
  """The same as Objects() in interop_test.cc."""
  return {
      "none": None,
      "true": True,
      "int": 17,
      "big": 1 << 40,
      "negative": -(1 << 62),
      "float": 1e-3,
      "text": "h\u00e9llo \U0001f600",
      "bytes": bytes(range(256)),
      "list": [1, "two", 3.0, None],
      "empty_list": [],
      "tuple": (0.9, 0.999),
      "one": (1,),
      "long": tuple(range(300)),
      "mixed": [(1, [2, (3,)]), "x"],
      "complex": 1.5 - 2j,
      "wide": 1 << 100,
      "wide_negative": -(1 << 63) - 1,
      "set": {1, "a", 2.5},
      "frozen": frozenset({(1, 2), 3}),
      "keys": ({
          (1, 2): "a",
          2.5: [None],
          None: {
              "x": 1
          },
          b"y": 3,
          "text": 4
      },),
      "pair": (torch.arange(6, dtype=torch.int16).reshape(2, 3), 5),
      "deep": ({"t": [torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0, 2)]}, "x"),
      "groups": [{"lr": 0.01, "params": ["a", "b"], "none": None}, {"lr": 0.02, "params": [], "none": None}],
  }


def flat_tensors(tree, path=()):
  for key, value in tree.items():
    if isinstance(value, torch.Tensor):
      yield ".".join(path + (key,)), value
    elif isinstance(value, dict):
      yield from flat_tensors(value, path + (key,))


def write(folder):
  save = lambda state, case, **options: dcp.save(
      state, storage_writer=dcp.FileSystemWriter(os.path.join(folder, case), **options), **ALONE)

  # Every dtype, every kind of shape, every kind of object.
  state = {"dtypes": {d: filled(d, [3, 5], i) for i, d in enumerate(DTYPES)}}
  state["shapes"] = {
      "scalar": filled("float32", [], 100),
      "empty": filled("float32", [0, 4], 101),
      "deep": filled("int16", [2, 1, 3, 1, 2], 102),
      "large": filled("float32", [300, 1000], 103),
  }
  base = filled("float32", [6, 8], 104)
  state["views"] = {
      "transposed": base.t(),
      "narrow": base[1:4, 2:5],
      "expanded": base[0].expand(4, 8),
      "column": base[:, 3],
      "permuted": filled("bfloat16", [2, 3, 4], 105).permute(2, 0, 1),
      "channels_last": filled("float32", [2, 3, 4, 5], 106).to(memory_format=torch.channels_last),
      "conjugate": filled("complex64", [3, 4], 120).conj(),
      "negative": torch._neg_view(filled("float64", [5], 121)),
  }
  state["dotted.key"] = {"layer.weight": filled("float64", [2], 107)}
  state["objects"] = objects()
  state["parameter"] = torch.nn.Parameter(filled("float32", [4], 108))
  state["strange"] = {
      "counter": collections.Counter("abca"),
      "ordered": (collections.OrderedDict(a=1),),
      "set": {1},
      "size": torch.Size([2, 3]),
      "dtype": torch.float32,
      "tensors": (torch.ones(2), 5),
      "huge": 1 << 100,
  }
  tensors = dict(flat_tensors({k: v for k, v in state.items() if isinstance(v, dict)}))
  tensors["parameter"] = state["parameter"]
  save(state, "everything")
  dump(os.path.join(folder, "everything.dump"), tensors)

  # Several files, and files without a byte.
  few = {"a": filled("float32", [5, 3], 1), "b": {"c": filled("int8", [7], 2)}, "o": 3}
  for case, options in (("threads", {"thread_count": 5}), ("file_per_item", {"single_file_per_rank": False})):
    save(few, case, **options)
    dump(os.path.join(folder, case + ".dump"), dict(flat_tensors(few)))

  # Compressed.
  if supported(dcp.FileSystemWriter.__init__, "_extensions"):
    from torch.distributed.checkpoint._extension import ZStandard
    state = {"w": torch.arange(100000, dtype=torch.float32).reshape(500, 200), "few": few}
    save(state, "zstd", _extensions=[ZStandard()])
    dump(os.path.join(folder, "zstd.dump"), dict(flat_tensors(state)))

  # Ranks: even, uneven and empty shards, two mesh dimensions, replicas, AdamW state.
  meeting = tempfile.mktemp(dir=folder)
  ranks = [
      subprocess.Popen([sys.executable, "-s", os.path.abspath(__file__), "rank", folder, str(rank), meeting])
      for rank in range(4)
  ]
  failed = [rank.wait(timeout=240) for rank in ranks]
  assert failed == [0] * 4, failed


def write_as_rank(folder, rank, meeting):
  from torch.distributed.device_mesh import init_device_mesh
  try:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
  except ImportError:
    from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_tensor
  dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=4)
  line = init_device_mesh("cpu", (4,))
  grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
  whole = {
      "even": filled("float32", [8, 6], 11),
      "uneven": filled("bfloat16", [5, 3], 12),
      "few": filled("int64", [4 if IS_OLD else 2], 13),
      "columns": filled("float32", [3, 10], 14),
      "grid": filled("float16", [7, 9], 15),
      "half": filled("float32", [6, 4], 16),
      "replicated": filled("float64", [4], 17),
  }
  state = {
      "even": distribute_tensor(whole["even"], line, [Shard(0)]),
      "uneven": distribute_tensor(whole["uneven"], line, [Shard(0)]),
      "few": distribute_tensor(whole["few"], line, [Shard(0)]),
      "columns": distribute_tensor(whole["columns"], line, [Shard(1)]),
      "grid": distribute_tensor(whole["grid"], grid, [Shard(0), Shard(1)]),
      "half": distribute_tensor(whole["half"], grid, [Replicate(), Shard(0)]),
      "replicated": distribute_tensor(whole["replicated"], line, [Replicate()]),
      "plain": torch.ones(3),
      "step": 5,
  }
  whole["plain"] = torch.ones(3)
  model = torch.nn.Linear(4, 4)
  with torch.no_grad():
    for number, parameter in enumerate(model.parameters()):
      parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 7 + number)
  for name in list(model._parameters):
    full = model._parameters[name].detach().clone()
    model._parameters[name] = torch.nn.Parameter(distribute_tensor(full, line, [Shard(0)]))
  optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
  for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
  optimizer.step()
  from torch.distributed.checkpoint.state_dict import get_state_dict
  state["model"], state["optim"] = get_state_dict(model, optimizer)
  for key, value in (("model", state["model"]), ("optim", state["optim"])):
    for name, tensor in flat_tensors({key: value}):
      whole[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
  dcp.save(state, storage_writer=dcp.FileSystemWriter(os.path.join(folder, "ranks")))
  # Each rank for itself, with an index of its own.
  state["mine"] = "of rank %d" % rank
  has_local = supported(dcp.save, "use_collectives")
  if has_local:
    dcp.save(state, checkpoint_id=os.path.join(folder, "local"), use_collectives=False)
  if rank == 0:
    dump(os.path.join(folder, "ranks.dump"), whole)
    if has_local:
      dump(os.path.join(folder, "local.dump"), whole)
  dist.barrier()
  os._exit(0)


def same(a, b, where):
  if isinstance(a, torch.Tensor):
    assert a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b), where
  elif isinstance(a, dict):
    assert isinstance(b, dict) and list(a) == list(b), (where, list(a), list(b))
    for key in a:
      same(a[key], b[key], "%s.%s" % (where, key))
  elif isinstance(a, (list, tuple)):
    assert type(a) is type(b) and len(a) == len(b), (where, a, b)
    for number, (x, y) in enumerate(zip(a, b)):
      same(x, y, "%s.%d" % (where, number))
  else:
    assert type(a) is type(b) and a == b, (where, a, b)


def check(folder):
  if not hasattr(torch.distributed.checkpoint.metadata, "StorageMeta"):
    print("torch %s lacks classes that later versions write" % torch.__version__)
    return
  directory = os.path.join(folder, "ckpt")
  expected = read_dump(os.path.join(folder, "ckpt.dump"))
  reader = dcp.FileSystemReader(directory)
  metadata = reader.read_metadata()

  # The index: keys, dtypes, shapes, chunks that cover each tensor once.
  flat_objects = {"objects." + k for k in objects() if k != "groups"}
  flat_objects |= {"objects.groups.%d.%s" % (g, k) for g in (0, 1) for k in ("lr", "params", "none")}
  assert set(metadata.state_dict_metadata) == set(expected) | flat_objects, set(metadata.state_dict_metadata) ^ (
      set(expected) | flat_objects)
  for key, tensor in expected.items():
    entry = metadata.state_dict_metadata[key]
    assert entry.size == tensor.shape and entry.properties.dtype == tensor.dtype, key
    covered = torch.zeros(tensor.shape, dtype=torch.int8)
    for chunk in entry.chunks:
      covered[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))] += 1
    assert bool((covered == 1).all()), key

  # Each stored item by itself: a whole zip archive that the restricted reader loads.
  for index, place in metadata.storage_data.items():
    with open(os.path.join(directory, place.relative_path), "rb") as data:
      data.seek(place.offset)
      item = data.read(place.length)
    assert zipfile.ZipFile(io.BytesIO(item)).testzip() is None, index
    # Its list of classes has no frozenset; dcp.load does not use it.
    value = torch.load(io.BytesIO(item), weights_only=index.fqn != "objects.frozen")
    if index.fqn in expected:
      chunk = metadata.state_dict_metadata[index.fqn].chunks[index.index]
      assert chunk.offsets == index.offset, index
      part = expected[index.fqn][tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))]
      same(part, value, index.fqn)
      assert value.is_contiguous(), index

  # dcp.load into a state dict of the same structure.
  state = {}
  for key, path in metadata.planner_data.items():
    if key in expected:
      at = state
      for part in path[:-1]:
        at = at.setdefault(part, {})
      at[path[-1]] = torch.full_like(expected[key].view(torch.uint8) if expected[key].numel() and expected[key].dim(
      ) else expected[key], 0).view(expected[key].dtype).reshape(expected[key].shape)
  state["objects"] = {key: None for key in objects() if key != "groups"}
  state["objects"]["groups"] = [{"lr": 0, "params": 0, "none": 0}, {"lr": 0, "params": 0, "none": 0}]
  dcp.load(state, storage_reader=dcp.FileSystemReader(directory), **ALONE)
  loaded = dict(flat_tensors({k: v for k, v in state.items() if k != "objects"}))
  same(dict(sorted(expected.items())), dict(sorted(loaded.items())), "dcp.load")
  same(objects(), state["objects"], "objects")

  # And with nothing known beforehand: the nesting comes from the checkpoint.
  if not IS_OLD:
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
    nested = {}
    _load_state_dict(nested, storage_reader=dcp.FileSystemReader(directory), planner=_EmptyStateDictLoadPlanner(),
                     no_dist=True)
    same(dict(sorted(expected.items())),
         dict(sorted(flat_tensors({k: v for k, v in nested.items() if k != "objects"}))), "empty planner")
    assert nested["objects"]["groups"] == objects()["groups"]

  print("python agrees on %d tensors and %d objects" % (len(expected), len(flat_objects)))


def main():
  if sys.argv[1] == "write":
    write(sys.argv[2])
  elif sys.argv[1] == "rank":
    write_as_rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
  elif sys.argv[1] == "dtypes":
    with open(os.path.join(sys.argv[2], "dtypes.txt"), "w", encoding="utf-8") as out:
      out.write("\n".join(DTYPES))
  elif sys.argv[1] == "check":
    check(sys.argv[2])
  else:
    sys.exit(__doc__)


if __name__ == "__main__":
  main()
