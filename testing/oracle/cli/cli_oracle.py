# SPDX-License-Identifier: Apache-2.0
"""The dsd program beside PyTorch and numpy, on checkpoints that Python wrote.

    cli_oracle.py DSD

1. `dsd cat` prints what print() prints: every dtype, many shapes and kinds of numbers, slices.
2. Its statistics are numpy's, its values in JSON are the tensor's.
3. `dsd diff` finds what numpy finds, by tolerances too.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile

import numpy
import torch
import torch.distributed.checkpoint as dcp

DTYPES = [
    "float32", "float64", "float16", "bfloat16", "complex32", "complex64", "complex128", "int8", "int16", "int32",
    "int64", "uint8", "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu"
]
SHAPES = [(), (1,), (0,), (3, 0), (7,), (1001,), (3, 4), (50, 30), (2, 3, 4), (11, 12, 13), (2, 1, 3, 1, 2),
          (1, 1001), (1001, 1), (30,)]


def run(dsd, *arguments):
  done = subprocess.run([dsd, *arguments], capture_output=True, text=True, check=False)
  return done.returncode, done.stdout, done.stderr


def save(state, folder):
  dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
  return folder


def random_bits(dtype, shape, generator):
  """Any bits, so that all special numbers come up; bools are 0 and 1."""
  count = math.prod(shape) * getattr(torch, dtype).itemsize
  if count == 0:
    return torch.zeros(shape, dtype=getattr(torch, dtype))
  data = generator.integers(0, 2 if dtype == "bool" else 256, count, dtype=numpy.uint8)
  if dtype == "float8_e8m0fnu":
    data[data == 255] = 254  # torch takes its NaN for finite and prints all others otherwise then
  return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)


def tensors_of(generator):
  """(name, tensor) of all kinds."""
  for dtype in DTYPES:
    kind = getattr(torch, dtype)
    for shape in SHAPES:
      name = "%s_%s" % (dtype, "x".join(map(str, shape)))
      yield name + "_bits", random_bits(dtype, shape, generator)
      if not kind.is_floating_point and not kind.is_complex:
        yield name + "_small", torch.from_numpy(generator.integers(0, 2, shape)).to(kind)
        continue
      if dtype == "float8_e8m0fnu":
        continue
      normal = torch.from_numpy(numpy.asarray(generator.standard_normal(shape)))
      yield name + "_normal", normal.to(kind)
      yield name + "_whole", torch.from_numpy(numpy.asarray(generator.integers(-9, 200, shape))).to(kind)
      yield name + "_wide", (normal * 10.0**generator.integers(-5, 5)).to(kind)
      if normal.numel() > 2:
        special = normal.clone().reshape(-1)
        special[::3] = float("nan")
        special[1::5] = float("inf")
        special[2::7] = -float("inf")
        special[0::11] = -0.0
        yield name + "_special", special.reshape(shape).to(kind)



def printable(tensor):
  """Whether this torch prints the tensor at all."""
  try:
    return str(tensor)
  except (RuntimeError, NotImplementedError):
    return None


def check_print(dsd, folder, tensors):
  compared, unprintable = 0, set()
  names = list(tensors)
  for begin in range(0, len(names), 100):
    part = names[begin:begin + 100]
    code, out, err = run(dsd, "cat", folder, *part)
    assert code == 0, err
    for name, block in zip(part, split_entries(out, part)):
      expected = printable(tensors[name])
      if expected is None:
        unprintable.add(str(tensors[name].dtype))
        continue
      found = block.split("\n", 2)[2]
      assert found == expected, "%s\n--- torch\n%s\n--- dsd\n%s" % (name, expected, found)
      compared += 1
  return compared, unprintable


def split_entries(out, names):
  """The output of `cat` for several keys: an empty line is between two, and is in tensors of many dimensions too."""
  lines = out.rstrip("\n").split("\n")
  starts, at = [], 0
  for name in names:
    while not (lines[at].startswith(name + "  ") and (at == 0 or lines[at - 1] == "")):
      at += 1
    starts.append(at)
    at += 1
  ends = [s - 1 for s in starts[1:]] + [len(lines)]
  return ["\n".join(lines[s:e]) for s, e in zip(starts, ends)]


def number(value):
  """Of JSON: "nan", [re, im], 1.5."""
  if isinstance(value, list):
    return complex(float(value[0]), float(value[1]))
  return float(value) if isinstance(value, str) else value


def as_numpy(tensor):
  """Wider, exact."""
  kind = tensor.dtype
  if kind.is_complex:
    return torch.view_as_real(tensor).to(torch.float64).numpy().view(numpy.complex128).reshape(tensor.shape)
  if kind.is_floating_point:
    return tensor.to(torch.float64).numpy()
  return tensor.numpy()


def close(a, b, scale):
  return abs(a - b) <= 1e-12 * max(abs(b), scale)


def check_statistics(dsd, folder, tensors):
  code, out, err = run(dsd, "cat", folder, "--json")
  assert code == 0, err
  numpy.seterr(invalid="ignore")  # comparing with NaN
  entries = {e["key"]: e["statistics"] for e in json.loads(out)["entries"]}
  for name, tensor in tensors.items():
    found = entries[name]
    values = as_numpy(tensor).reshape(-1)
    assert found["count"] == values.size, name
    assert found["zeros"] == int((values == 0).sum()), name
    if values.dtype.kind in "fc":
      is_nan = numpy.isnan(values)
      is_inf = numpy.isinf(values) & ~is_nan
      finite = values[~is_nan & ~is_inf]
    else:
      is_nan = is_inf = numpy.zeros(0)
      finite = values
    assert found["nan"] == int(is_nan.sum()) and found["inf"] == int(is_inf.sum()), name
    if finite.size == 0:
      assert found["min"] is None and found["mean"] is None and found["std"] is None, name
      continue
    ordered = abs(finite) if finite.dtype.kind == "c" else finite
    low, high = ordered.min().item(), ordered.max().item()
    exact = finite.dtype.kind != "c"
    assert number(found["min"]) == low if exact else close(number(found["min"]), low, 0), (name, found, low)
    assert number(found["max"]) == high if exact else close(number(found["max"]), high, 0), (name, found, high)
    wide = finite.astype(numpy.clongdouble if finite.dtype.kind == "c" else numpy.longdouble)
    scale = float(abs(wide).max())
    mean = wide.mean()
    assert close(number(found["mean"]), complex(mean) if finite.dtype.kind == "c" else float(mean), scale), (
        name, found, mean)
    std = float(numpy.sqrt((abs(wide - mean)**2).mean()))
    assert close(number(found["std"]), std, scale), (name, found, std)
  return len(tensors)


def flat(nested, depth):
  if depth == 0:
    return [number(nested)]
  return [x for item in nested for x in flat(item, depth - 1)]


def check_values(dsd, folder, tensors, generator):
  """All values of a slice, in JSON."""
  names = [n for n in tensors if tensors[n].numel() <= 3000]
  generator.shuffle(names)
  for name in names[:150]:
    tensor = tensors[name]
    index, text = [], []
    for extent in tensor.shape:
      choice = generator.randrange(4)
      if choice == 0 and extent > 0:
        at = generator.randrange(-extent, extent)
        index.append(at)
        text.append(str(at))
      elif choice == 1:
        low, high = (generator.randrange(-extent - 2, extent + 3) for _ in range(2))
        index.append(slice(low, high))
        text.append("%d:%d" % (low, high))
      else:
        index.append(slice(None))
        text.append(":")
    part = tensor[tuple(index)] if index else tensor
    code, out, err = run(dsd, "cat", folder, "--json", "--full", "%s[%s]" % (name, ",".join(text)))
    assert code == 0, (name, text, err)
    entry = json.loads(out)["entries"][0]
    assert entry["shape"] == list(part.shape), (name, text, entry["shape"], part.shape)
    expected = as_numpy(part).reshape(-1)
    found = numpy.array(flat(entry["values"], part.dim()), dtype=expected.dtype)
    assert numpy.array_equal(found, expected, equal_nan=expected.dtype.kind in "fc"), (name, text)
  return 150


def check_diff(dsd, work, generator):
  """Tolerances as numpy has them."""
  cases = 0
  for dtype in ("float32", "float64", "bfloat16", "float8_e4m3fn", "int64", "complex64"):
    kind = getattr(torch, dtype)
    rng = numpy.random.default_rng(generator.randrange(1 << 30))
    a = torch.from_numpy(rng.standard_normal((20, 30)) * 10)
    b = a * torch.from_numpy(1 + rng.standard_normal((20, 30)) * 0.01)
    b[rng.random((20, 30)) < 0.5] = 0
    a[b == 0] = 0
    a, b = a.to(kind), b.to(kind)
    a_dir = save({"w": a}, os.path.join(work, "a_" + dtype))
    b_dir = save({"w": b}, os.path.join(work, "b_" + dtype))
    for rtol, atol in ((0, 0), (0.01, 0), (0, 0.05), (0.005, 0.02), (1, 1)):
      wide_a, wide_b = as_numpy(a), as_numpy(b)
      same = numpy.isclose(wide_a, wide_b, rtol=rtol, atol=atol, equal_nan=True)
      code, out, err = run(dsd, "diff", a_dir, b_dir, "--json", "--rtol", repr(rtol), "--atol", repr(atol))
      found = json.loads(out)
      assert found["same"] == bool(same.all()) and code == (0 if same.all() else 1), (dtype, rtol, atol, err)
      cases += 1
      if same.all():
        continue
      entry = found["differences"][0]
      where = numpy.argwhere(~same)
      assert entry["elements"] == len(where), (dtype, rtol, atol, entry, len(where))
      assert entry["first"] == where[0].tolist(), (entry, where[0])
      distance = abs(wide_a - wide_b)[~same]
      assert close(entry["max_abs"], distance.max(), 0), (entry, distance.max())
      size = abs(wide_b)[~same]
      if (size > 0).any():
        relative = (distance[size > 0] / size[size > 0]).max()
        assert close(entry["max_rel"], relative, 0), (entry, relative)
  return cases


def main():
  dsd = os.path.abspath(sys.argv[1])
  seed = int(os.environ.get("DSD_TEST_SEED") or random.SystemRandom().randrange(1 << 30))
  print("DSD_TEST_SEED=%d" % seed)
  generator = numpy.random.default_rng(seed)
  work = tempfile.mkdtemp(dir=os.environ.get("TEST_TMPDIR"))
  tensors = dict(tensors_of(generator))
  folder = save(dict(tensors), os.path.join(work, "all"))
  compared, unprintable = check_print(dsd, folder, tensors)
  print("%d tensors are printed as torch prints them; torch itself does not print %s" %
        (compared, sorted(unprintable) or "none"))
  print("%d statistics are numpy's" % check_statistics(dsd, folder, tensors))
  print("%d slices have their values" % check_values(dsd, folder, tensors, random.Random(seed)))
  print("%d comparisons are numpy's" % check_diff(dsd, work, random.Random(seed)))


if __name__ == "__main__":
  main()
