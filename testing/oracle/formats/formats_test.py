# SPDX-License-Identifier: Apache-2.0
"""PyTorch and safetensors on the other side of `dsd convert`: what Python writes, in every format, dsd makes into every
other, and Python reads it back, bit for bit.

usage: formats_test.py DSD
"""

import collections
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest
import zipfile

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

DSD = None  # set by main

# Name in torch, name in safetensors.
DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "complex32": None, "complex64": "C64",
    "complex128": None, "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4"
}
# What the package's pinned version reads and writes itself.
PACKAGE_DTYPES = {
    "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool", "float8_e4m3fn",
    "float8_e5m2"
}
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


def tensor_of(data, dtype, shape):
  flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
  return flat.view(getattr(torch, dtype)).reshape(shape)


def bytes_of(tensor):
  flat = tensor.detach().contiguous().reshape(-1)
  return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def filled(dtype, shape, seed):
  """Random elements; bytes of 0 and 1 only, which every dtype can have."""
  count = getattr(torch, dtype).itemsize
  for extent in shape:
    count *= extent
  data = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
  return tensor_of(data.numpy().tobytes(), dtype, shape)


def whole_state():
  """Every dtype, every kind of shape and view, nested, with objects."""
  base = filled("float32", [6, 8], 104)
  shared = filled("int32", [4, 5], 105)
  parameter = torch.nn.Parameter(filled("float32", [4], 108))
  return {
      "dtypes": {d: filled(d, [3, 4], i) for i, d in enumerate(DTYPES)},
      "model": collections.OrderedDict([
          ("scalar", filled("float32", [], 100)),
          ("empty", filled("float32", [0, 4], 101)),
          ("deep", filled("int16", [2, 1, 3, 1, 2], 102)),
          ("large", filled("float32", [300, 1000], 103)),
          ("transposed", base.t()),
          ("narrow", base[1:4, 2:5]),
          ("expanded", base[0].expand(4, 8)),
          ("column", base[:, 3]),
          ("permuted", filled("bfloat16", [2, 3, 4], 106).permute(2, 0, 1)),
          ("tied", shared),
          ("tied_too", shared),
          ("tied_row", shared[2]),
          ("parameter", parameter),
      ]),
      "optim": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": filled("float32", [2, 2], 109)}},
                "param_groups": [{"lr": 0.01, "betas": (0.9, 0.999), "params": [0, 1], "fused": None}]},
      "list": [filled("int64", [2], 110), {"x": filled("int8", [3], 111)}],
      "step": 17,
      "text": "h\u00e9llo \U0001f600",
      "bytes": bytes(range(256)),
      "size": torch.Size([2, 3]),
      "dtype": torch.bfloat16,
      "flags": [True, False, None],
  }


def flat(tree, path=()):
  """Tensors by key, as in a state dict of torch.distributed.checkpoint; tuples with tensors count as lists."""
  out = {}
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, value in items:
    at = path + (str(key),)
    if isinstance(value, torch.Tensor):
      out[".".join(at)] = value
    elif isinstance(value, (dict, list, tuple)):
      out.update(flat(value, at))
  return out


def same(test, expected, found, where):
  test.assertEqual(sorted(expected), sorted(found), where)
  for key, tensor in expected.items():
    test.assertEqual(tensor.dtype, found[key].dtype, (where, key))
    test.assertEqual(tensor.shape, found[key].shape, (where, key))
    test.assertEqual(bytes_of(tensor), bytes_of(found[key]), (where, key))


def dsd(*arguments, code=0):
  result = subprocess.run([DSD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120, check=False)
  if result.returncode != code:
    raise AssertionError("dsd %s: exit code %d, expected %d\n%s%s" % (arguments, result.returncode, code,
                                                                    result.stdout.decode(), result.stderr.decode()))
  return (result.stdout + result.stderr).decode()


def digests(path):
  return json.loads(dsd("digest", "--json", path))["keys"]


def write_safetensors(path, tensors, metadata=None):
  """By hand, so that it has what the package's version lacks."""
  header, data = {}, b""
  if metadata:
    header["__metadata__"] = metadata
  for key, tensor in tensors.items():
    shape = list(tensor.shape)
    dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
    if dtype == "F4":
      shape[-1] *= 2
    elements = bytes_of(tensor)
    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(elements)]}
    data += elements
  text = json.dumps(header).encode()
  with open(path, "wb") as out:
    out.write(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
  with open(path, "rb") as file:
    content = file.read()
  size = struct.unpack("<Q", content[:8])[0]
  header = json.loads(content[8:8 + size])
  names = {v: k for k, v in DTYPES.items() if v}
  assert (8 + size) % 8 == 0, "elements are not aligned"
  out = {}
  for key, entry in header.items():
    if key == "__metadata__":
      continue
    begin, end = entry["data_offsets"]
    shape = list(entry["shape"])
    if entry["dtype"] == "F4":
      shape[-1] //= 2
    dtype = names[entry["dtype"]]
    assert begin % getattr(torch, dtype).itemsize == 0, key
    out[key] = tensor_of(content[8 + size + begin:8 + size + end], dtype, shape)
  return out


def read_safetensors_directory(path):
  index = os.path.join(path, "model.safetensors.index.json")
  if not os.path.exists(index):
    return read_safetensors(os.path.join(path, "model.safetensors"))
  with open(index, encoding="utf-8") as file:
    weight_map = json.load(file)["weight_map"]
  out = {}
  for name in sorted(set(weight_map.values())):
    for key, tensor in read_safetensors(os.path.join(path, name)).items():
      assert weight_map[key] == name, key
      out[key] = tensor
  assert sorted(out) == sorted(weight_map)
  return out


def read_dcp(path):
  state = {}
  _load_state_dict(state, storage_reader=dcp.FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
  return state


class FormatsTest(unittest.TestCase):

  def setUp(self):
    self.folder = tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR"))

  def path(self, *names):
    path = os.path.join(self.folder, *names)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path

  def sources(self, state):
    """The state as Python writes it, in each format that has a place for it."""
    yield "torch", self.path("in", "state.pt"), True
    torch.save(state, self.path("in", "state.pt"))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(self.path("in", "dcp")), no_dist=True)
    yield "dcp", self.path("in", "dcp"), True
    storable = {k: t for k, t in flat(state).items() if DTYPES[str(t.dtype).removeprefix("torch.")]}
    write_safetensors(self.path("in", "state.safetensors"), storable, {"format": "pt"})
    yield "safetensors", self.path("in", "state.safetensors"), False

  def test_matrix(self):
    state = whole_state()
    expected = flat(state)
    storable = {k: t for k, t in expected.items() if DTYPES[str(t.dtype).removeprefix("torch.")]}
    torch.save(state, self.path("in", "state.pt"))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(self.path("in", "dcp")), no_dist=True)
    write_safetensors(self.path("in", "all.safetensors"), storable, {"format": "pt"})
    sources = {"torch": (self.path("in", "state.pt"), expected), "dcp": (self.path("in", "dcp"), expected),
               "safetensors": (self.path("in", "all.safetensors"), storable)}
    known = digests(sources["torch"][0])
    for name, (source, tensors) in sources.items():
      found = digests(source)
      for key in tensors:
        self.assertEqual(known[key], found[key], (name, key))

      # An archive.
      target = self.path("out", name + ".pt")
      dsd("convert", source, target)
      for options in ({}, {"mmap": True}):
        loaded = torch.load(target, weights_only=True, **options)
        same(self, tensors, flat(loaded), (name, "torch", options))
      if name == "torch":
        self.assertEqual(loaded["model"]["tied"].data_ptr(), loaded["model"]["tied_too"].data_ptr())
        loaded["model"]["tied"][1, 2] = 99
        self.assertEqual(loaded["model"]["tied_too"][1, 2], 99)
      meta = torch.load(target, weights_only=True, map_location="meta")
      self.assertEqual(sorted(flat(meta)), sorted(tensors))
      self.assertIsNone(zipfile.ZipFile(target).testzip())
      with zipfile.ZipFile(target) as archive:
        self.assertIn("tensor %s model.scalar\n" % known["model.scalar"],
                      archive.read("archive/.dsd_digests").decode())
      self.assertIn(" %d content digests" % len(tensors), dsd("verify", target))
      if name != "safetensors":
        for key in ("step", "text", "bytes", "flags", "dtype"):
          self.assertEqual(loaded[key], state[key], (name, key))
        self.assertEqual(tuple(loaded["size"]), (2, 3))
        self.assertEqual(loaded["optim"]["param_groups"], state["optim"]["param_groups"])

      # DCP.
      target = self.path("out", name + ".dcp")
      dsd("convert", source, target, "--to=dcp")
      loaded = read_dcp(target)
      same(self, tensors, flat(loaded), (name, "dcp"))
      if name != "safetensors":
        self.assertEqual(loaded["optim"]["param_groups"][0]["betas"], (0.9, 0.999))

      # One safetensors file and several: without the dtypes that have no form there.
      if name == "safetensors":
        one = self.path("out", name + ".safetensors")
        dsd("convert", source, one)
        same(self, storable, read_safetensors(one), (name, "one"))
        many = self.path("out", name + ".dir")
        dsd("convert", source, many, "--to=safetensors", "--max-shard-size=400")
        self.assertGreater(len(os.listdir(many)), 3)
        same(self, storable, read_safetensors_directory(many), (name, "many"))
        for target in (one, many):
          self.assertEqual(digests(target), {k: known[k] for k in storable})
      else:
        text = dsd("convert", source, self.path("out", "no.safetensors"), code=3)
        self.assertIn("optim.param_groups", text)
        text = dsd("convert", "--drop-objects", source, self.path("out", "no.safetensors"), code=2)
        self.assertIn("complex128", text)
        self.assertFalse(os.path.exists(self.path("out", "no.safetensors")))

  def test_the_package_reads_what_dsd_writes(self):
    tensors = {d: filled(d, [3, 4], i) for i, d in enumerate(sorted(PACKAGE_DTYPES))}
    tensors.update(scalar=filled("float32", [], 50), empty=filled("int64", [0, 3], 51))
    metadata = {"format": "pt", "note": "h\u00e9 \"quoted\""}
    source = self.path("package.safetensors")
    safetensors.torch.save_file(tensors, source, metadata)
    # From Python to C++ to Python.
    target = self.path("again.safetensors")
    dsd("convert", source, target)
    same(self, tensors, safetensors.torch.load_file(target), "again")
    with safetensors.safe_open(target, framework="pt") as file:
      self.assertEqual({k: v for k, v in file.metadata().items() if k != "dsd_digests"}, metadata)
      self.assertIn("tensor %s float32\n" % digests(source)["float32"], file.metadata()["dsd_digests"])
      self.assertEqual(bytes_of(file.get_slice("float32")[1:2]), bytes_of(tensors["float32"][1:2]))
    # To C++ once more.
    safetensors.torch.save_file(safetensors.torch.load_file(target), self.path("third.safetensors"), metadata)
    self.assertEqual(digests(source), digests(self.path("third.safetensors")))
    many = self.path("many")
    dsd("convert", source, many, "--to=safetensors", "--max-shard-size=100")
    found = {}
    for name in os.listdir(many):
      if name.endswith(".safetensors"):
        found.update(safetensors.torch.load_file(os.path.join(many, name)))
    same(self, tensors, found, "many")

  def test_renames_and_casts_as_torch_does(self):
    values = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 10**e for e in range(-9, 9)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.9, 65520, 3.4e38])])
    # Between all neighbours of the small types, and on them.
    small = torch.arange(256, dtype=torch.uint8)
    model = {"w": values, "d": values.double() * 1.0000001, "h": values.half(), "n": torch.arange(5), "b": values > 0,
             "all16": torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)}
    for dtype in FLOAT8:
      model[dtype] = small.view(getattr(torch, dtype))
      points = model[dtype].float()
      points = points[points.isfinite()].sort().values
      middle = (points[1:] + points[:-1]) / 2
      model["near." + dtype] = torch.cat([points, middle, middle.nextafter(points[1:]), middle.nextafter(points[:-1]),
                                          points[-1:] * 1.0625, points[-1:] * 1.07, points[-1:] * 2, -points[:1]])
    torch.save({"model": model}, self.path("state.pt"))
    for dtype in ("float64", "float32", "float16", "bfloat16") + FLOAT8:
      target = self.path(dtype + ".safetensors")
      text = dsd("convert", self.path("state.pt"), target, "--dtype", dtype, "--rename", "model.*=net.*")
      self.assertIn("renamed %d keys" % len(model), text)
      found = read_safetensors(target)
      for key, value in model.items():
        expected = value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        # A NaN is a NaN; its other bits differ between PyTorch's own ways to cast.
        nan = expected.double().isnan() if expected.is_floating_point() else torch.zeros(expected.shape, dtype=torch.bool)
        self.assertEqual(nan.tolist(), [bool(x != x) for x in found["net." + key].double().tolist()], (dtype, key))
        clear = lambda t: torch.where(nan.reshape(-1, 1), 0, t.view(torch.uint8).reshape(len(t), -1))
        self.assertTrue(torch.equal(clear(expected), clear(found["net." + key])), (dtype, key))
    dsd("convert", self.path("state.pt"), self.path("flat.pt"), "--rename", "model.*=*")
    self.assertEqual(sorted(torch.load(self.path("flat.pt"), weights_only=True)), sorted(model))

  def test_objects_with_tensors_and_without_json(self):
    state = {"w": filled("float32", [3], 1), "pair": (filled("int16", [2, 3], 2), {"x": filled("bfloat16", [], 3)}, 5),
             "set": {1, "a"}, "complex": 1 - 2j, "wide": -(1 << 70), "keys": ({(1, 2): [None], 2.5: "x"},),
             "inside": ({None: filled("int8", [3], 4), (1,): filled("int16", [2], 5)}, filled("int32", [2], 6))}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(self.path("in")), no_dist=True)
    dsd("convert", self.path("in"), self.path("again"), "--to=dcp")
    dsd("convert", self.path("again"), self.path("out.pt"))
    self.assertEqual(digests(self.path("in")), digests(self.path("again")))
    for loaded in (read_dcp(self.path("again")), torch.load(self.path("out.pt"), weights_only=True)):
      same(self, flat(state), flat(loaded), "objects")
      self.assertIsInstance(loaded["pair"], tuple)
      self.assertEqual(loaded["pair"][2], 5)
      for key in ("set", "complex", "wide"):
        self.assertEqual(loaded[key], state[key], key)
        self.assertIs(type(loaded[key]), type(state[key]), key)
      self.assertEqual(loaded["keys"], state["keys"])
      self.assertEqual(list(loaded["inside"][0]), list(state["inside"][0]))
      for one, other in zip((*loaded["inside"][0].values(), loaded["inside"][1]),
                            (*state["inside"][0].values(), state["inside"][1])):
        self.assertTrue(torch.equal(one, other))
    for path in ("in", "again", "out.pt"):
      self.assertIn("no problems", dsd("verify", self.path(path)))
    # In an archive, tensors in a tuple have keys of their own.
    self.assertIn("pair.1.x", dsd("ls", self.path("out.pt")))
    self.assertIn("(1-2j)", dsd("cat", self.path("again"), "complex"))

  def test_archives_keep_their_nesting(self):
    model = torch.nn.Linear(3, 2)
    sgd, adam = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model.parameters(), 0.1)
    for optimizer in (sgd, adam):
      model(torch.ones(1, 3)).sum().backward()
      optimizer.step()
    state = {"sgd": sgd.state_dict(), "adam": adam.state_dict(), "hidden": (torch.ones(2), [torch.zeros(1), {}]),
             "four": tuple(torch.full([1], i) for i in range(4)), "counts": {-1: {2: "x"}, 10**18: torch.ones(1)},
             "mixed": {1: "one", "two": 2}, "nothing": {}, "list": [{}, [], ()], "numbers": {"1": 1, "2": 2}}

    def kinds(tree):
      if isinstance(tree, dict):
        return {key: kinds(value) for key, value in tree.items()}
      if isinstance(tree, (list, tuple)):
        return type(tree)(kinds(value) for value in tree)
      return tree.tolist() if isinstance(tree, torch.Tensor) else tree

    torch.save(state, self.path("in.pt"))
    dsd("convert", self.path("in.pt"), self.path("out.pt"))
    loaded = torch.load(self.path("out.pt"), weights_only=True)
    self.assertEqual(kinds(loaded), kinds(state))
    for optimizer in (sgd, adam):
      optimizer.load_state_dict(loaded["sgd" if optimizer is sgd else "adam"])
    self.assertEqual(kinds(adam.state_dict()), kinds(state["adam"]))
    dsd("convert", self.path("in.pt"), self.path("named.pt"), "--rename", "adam.*=a.b.*", "--rename", "nothing=void",
        "--rename", "hidden.*=state.hidden.*")
    loaded = torch.load(self.path("named.pt"), weights_only=True)
    self.assertEqual(kinds(loaded["a.b"]), kinds(state["adam"]))
    self.assertEqual(loaded["void"], {})
    self.assertEqual(kinds(loaded["state"]["hidden"]), kinds(state["hidden"]))

  def test_shards_of_distributed_checkpoint(self):
    meeting = tempfile.mktemp(dir=self.folder)
    ranks = [subprocess.Popen([sys.executable, "-s", os.path.abspath(__file__), "rank", self.folder, str(r), meeting])
             for r in range(2)]
    self.assertEqual([rank.wait(timeout=240) for rank in ranks], [0, 0])
    shards = os.path.join(self.folder, "shards")
    self.assertEqual(len([n for n in os.listdir(shards) if n.endswith(".safetensors")]), 2)
    expected = hf_state()
    self.assertIn("no problems", dsd("verify", shards))
    for target, options in (("w.safetensors", []), ("w.pt", []), ("w", ["--to=dcp"])):
      dsd("convert", shards, self.path(target), *options)
    same(self, expected, read_safetensors(self.path("w.safetensors")), "shards")
    same(self, expected, torch.load(self.path("w.pt"), weights_only=True), "shards")
    same(self, expected, flat(read_dcp(self.path("w"))), "shards")
    # A shard that is lost.
    os.remove(os.path.join(shards, sorted(n for n in os.listdir(shards) if n.startswith("shard-"))[0]))
    os.makedirs(self.path("never"), exist_ok=True)
    self.assertIn("chunk", dsd("verify", shards, code=1))

  def test_layouts_of_the_hub(self):
    tensors = {"a.weight": filled("float32", [4, 4], 1), "b.weight": filled("bfloat16", [8], 2)}
    blobs = self.path("blobs", "x")
    snapshot = self.path("snapshots", "main", "x")
    os.makedirs(os.path.dirname(snapshot), exist_ok=True)
    snapshot = os.path.dirname(snapshot)
    blobs = os.path.dirname(blobs)
    weight_map = {}
    for number, (key, tensor) in enumerate(tensors.items(), 1):
      name = "model-%05d-of-00002.safetensors" % number
      safetensors.torch.save_file({key: tensor}, os.path.join(blobs, str(number)), {"format": "pt"})
      os.symlink(os.path.join("..", "..", "blobs", str(number)), os.path.join(snapshot, name))
      weight_map[key] = name
    # Without an index, then with one.
    for _ in range(2):
      dsd("convert", snapshot, self.path("hub.pt"), "--overwrite")
      same(self, tensors, torch.load(self.path("hub.pt"), weights_only=True), "hub")
      with open(os.path.join(snapshot, "model.safetensors.index.json"), "w", encoding="utf-8") as index:
        json.dump({"metadata": {"total_size": 80}, "weight_map": weight_map}, index)
    # A link that leads nowhere, one to itself, one to a pipe.
    victim = os.path.join(snapshot, "model-00002-of-00002.safetensors")
    os.remove(victim)
    self.assertIn("not there", dsd("ls", snapshot, code=3))
    os.symlink("nowhere", victim)
    self.assertIn("not there", dsd("ls", snapshot, code=3))
    os.remove(victim)
    os.symlink(os.path.basename(victim), victim)
    dsd("ls", snapshot, code=3)
    os.remove(victim)
    os.mkfifo(victim)
    self.assertIn("not a regular file", dsd("ls", snapshot, code=3))
    # Overwriting a link replaces it and not what it leads to.
    safetensors.torch.save_file(tensors, self.path("kept.safetensors"))
    before = os.stat(self.path("kept.safetensors"))
    os.symlink("kept.safetensors", self.path("link.safetensors"))
    dsd("convert", self.path("hub.pt"), self.path("link.safetensors"), "--overwrite", "--dtype=float16")
    self.assertEqual(os.stat(self.path("kept.safetensors")), before)
    self.assertFalse(os.path.islink(self.path("link.safetensors")))

  def test_other_files_of_torch(self):
    state = {"w": filled("float32", [3, 4], 1), "c": filled("complex64", [2], 2), "b": filled("bool", [5], 3)}
    # Big-endian, as such a machine would write it.
    source, target = self.path("little.pt"), self.path("big.pt")
    torch.save(state, source)
    items = {"0": 4, "1": 4, "2": 1}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
      for name in old.namelist():
        data = old.read(name)
        short = name.split("/", 1)[1]
        if short == "byteorder":
          data = b"big"
        elif short.startswith("data/"):
          size = items[short[5:]]
          data = b"".join(data[i:i + size][::-1] for i in range(0, len(data), size))
        new.writestr(name, data)
    self.assertEqual(digests(source), digests(target))

    # Forms that are known, and refused with a word on what to do.
    torch.save(state, self.path("old.pt"), _use_new_zipfile_serialization=False)
    self.assertIn("before PyTorch 1.6", dsd("ls", self.path("old.pt"), code=3))
    torch.save(torch.nn.Linear(2, 2), self.path("module.pt"))
    self.assertIn("torch.nn.modules.linear.Linear", dsd("ls", self.path("module.pt"), code=3))
    torch.jit.script(torch.nn.Linear(2, 2)).save(self.path("script.pt"))
    self.assertIn("TorchScript", dsd("ls", self.path("script.pt"), code=3))
    packed = io.BytesIO()
    torch.save(state, packed)
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(self.path("packed.pt"), "w", zipfile.ZIP_DEFLATED) as new:
      for name in old.namelist():
        new.writestr(name, old.read(name))
    self.assertIn("compressed", dsd("ls", self.path("packed.pt"), code=3))

    # Kinds of tensors that are listed and not converted.
    torch.save({"s": torch.eye(3).to_sparse(), "q": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
                "w": state["w"]}, self.path("kinds.pt"))
    text = dsd("ls", self.path("kinds.pt"))
    self.assertIn("_rebuild_sparse_tensor", text)
    text = dsd("convert", self.path("kinds.pt"), self.path("never.pt"), code=3)
    self.assertIn("_rebuild_qtensor", text)

    # A lone tensor, a list, a subclass, a state dict with hidden attributes.
    torch.save(state["w"], self.path("lone.pt"))
    dsd("convert", self.path("lone.pt"), self.path("lone2.pt"))
    same(self, {"value": state["w"]}, torch.load(self.path("lone2.pt"), weights_only=True), "lone")
    torch.save([state["w"], {"x": state["b"]}], self.path("list.pt"))
    dsd("convert", self.path("list.pt"), self.path("list2.pt"))
    loaded = torch.load(self.path("list2.pt"), weights_only=True)
    self.assertIsInstance(loaded, list)
    self.assertEqual(bytes_of(loaded[1]["x"]), bytes_of(state["b"]))
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), self.path("model.pth"))
    dsd("convert", self.path("model.pth"), self.path("model.safetensors"))
    same(self, model.state_dict(), safetensors.torch.load_file(self.path("model.safetensors")), "model")
    dsd("convert", self.path("model.safetensors"), self.path("model2.pth"))
    model.load_state_dict(torch.load(self.path("model2.pth"), weights_only=True))

    # Nothing in a file is executed.
    class Evil:

      def __reduce__(self):
        return os.mkdir, (os.path.join(self_folder, "executed"),)

    self_folder = self.folder
    torch.save({"w": state["w"], "evil": Evil()}, self.path("evil.pt"))
    dsd("ls", self.path("evil.pt"))
    dsd("verify", self.path("evil.pt"))
    dsd("convert", self.path("evil.pt"), self.path("evil2.pt"), code=3)
    dsd("convert", self.path("evil.pt"), self.path("evil2.pt"), "--drop-objects")
    self.assertFalse(os.path.exists(os.path.join(self.folder, "executed")))
    self.assertEqual(sorted(torch.load(self.path("evil2.pt"), weights_only=True)), ["w"])


def hf_state():
  return {
      "even": filled("float32", [8, 6], 11),
      "uneven": filled("bfloat16", [5, 3], 12),
      "columns": filled("float16", [3, 10], 14),
      "replicated": filled("float32", [4], 17),
  }


def write_as_rank(folder, rank, meeting):
  from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
  dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
  mesh = init_device_mesh("cpu", (2,))
  placements = {"even": Shard(0), "uneven": Shard(0), "columns": Shard(1), "replicated": Replicate()}
  state = {k: distribute_tensor(t, mesh, [placements[k]]) for k, t in hf_state().items()}
  dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(os.path.join(folder, "shards"), save_distributed=True))
  dist.barrier()
  os._exit(0)


if __name__ == "__main__":
  if sys.argv[1] == "rank":
    write_as_rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
  DSD = os.path.abspath(sys.argv.pop(1))
  unittest.main()
