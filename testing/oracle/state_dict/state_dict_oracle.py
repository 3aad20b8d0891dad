# SPDX-License-Identifier: Apache-2.0
"""The Python side of state_dict_oracle_test: what torch.distributed.checkpoint.state_dict does in each configuration.

    state_dict_oracle.py generate OUT           chooses the configurations and writes the golden file
    state_dict_oracle.py again GOLDEN OUT       the same for the configurations of GOLDEN
    state_dict_oracle.py show GOLDEN NUMBER     prints one configuration with its results

The first two print how many pairs of values there are. A golden file may be packed (golden.txt.gz: gzip -9 -n).

In every configuration a saved model and its optimizers (side A) are read with get, and a live one with other values (side B)
is set from A's dicts. Nothing is trained: parameters, buffers and optimizer state are filled with patterns that depend on side,
name and index only, so that all results are exact. A result is text, one line per value with type, shape and the CRC-32 of the
elements that the rank holds; job.cc makes the same text.
"""

import collections
import datetime
import gzip
import itertools
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
import zlib

import configurations

# Of the golden file.
HEADER = """# What Python's get and set give in each configuration; made by state_dict_oracle.py, do not edit.
# model, optimizer: as in configurations.py. config: the values of the axes. get, set, path: rank, block of the model, block of
# the optimizers. path is there where Python fails or goes wrong: the same set by the way that works in Python, which is shards
# and no options, the flat form for an optimizer without state, the nested one where state is missing, and not strict if all
# that is missing is the second name of a tensor or a momentum buffer.
# block: a result, "|" before each line.
"""

MODULUS = {
    "float32": 8388593,
    "float64": 8388593,
    "bfloat16": 251,
    "float16": 2039,
    "int64": 8388593,
    "uint8": 251,
    "bool": 2
}
CAST = {
    "no": {},
    "narrow": {
        "float32": "bfloat16",
        "float64": "float32"
    },
    "wide": {
        "float32": "float64"
    },
}


def dtype_name(dtype):
  return str(dtype).removeprefix("torch.")


class Worker:
  """One rank."""

  def __init__(self, rank, world):
    # Only ranks need PyTorch.
    global torch, dist, dcp_state, DTensor, distribute_tensor, placement_types, fully_shard, init_device_mesh
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint.state_dict as dcp_state
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor, placement_types
    torch.set_num_threads(1)
    self.rank = rank
    self.world = world
    self.meshes = {}

  def mesh(self, shape, names):
    if names not in self.meshes:
      self.meshes[names] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return self.meshes[names]

  # Models.

  def loose(self, arguments, dtype):
    module = torch.nn.Module()
    for argument in arguments:
      name, shape = argument.split("=")
      shape, _, buffer_type = shape.partition(":")
      shape = [int(e) for e in shape.split("x")] if shape else []
      if buffer_type:
        module.register_buffer(name, torch.zeros(shape, dtype=getattr(torch, buffer_type)))
      else:
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return module

  def module(self, kind, arguments, dtype):
    if kind == "Loose":
      return self.loose(arguments, dtype)
    numbers = [int(a) for a in arguments[0].split(",") if a.isdigit()]
    options = {"bias": False} if arguments[0].endswith("nobias") else {}
    # Counters stay what they are.
    return getattr(torch.nn, kind)(*numbers, **options).to(dtype)

  def build(self, c, cast):
    """The model, without values, in one piece; and where tensor parallelism cuts each parameter."""
    root = torch.nn.Module()
    cuts = {}

    def parent_of(path):
      module = root
      segments = path.split(".")
      for segment in segments[:-1]:
        if not hasattr(module, segment):
          module.add_module(segment, torch.nn.Module())
        module = getattr(module, segment)
      return module, segments[-1]

    for line in configurations.MODELS[c["model"]]:
      words = line.split()
      if words[0] in ("tie", "share"):
        parent, name = parent_of(words[1])
        setattr(parent, name, root.get_parameter(words[2]) if words[0] == "tie" else root.get_submodule(words[2]))
        continue
      path, kind = words[:2]
      at = next(i for i, w in enumerate(words) if w in MODULUS)
      module = self.module(kind, words[2:at], getattr(torch, cast.get(words[at], words[at])))
      for name, buffer in module.named_buffers():
        if kind == "Loose":
          setattr(module, name, buffer.to(getattr(torch, cast.get(dtype_name(buffer.dtype), dtype_name(buffer.dtype)))))
      parent, name = parent_of(path)
      parent.add_module(name, module)
      for (parameter, _), cut in zip(module.named_parameters(), words[at + 1:], strict=True):
        cuts[path + "." + parameter] = cut
    return root, cuts

  def place(self, c, root, cuts):
    placement = c["placement"]
    if placement == "plain":
      return
    mesh = {
        "fsdp": ((self.world,), ("fsdp",)),
        "tp": ((self.world,), ("tp",)),
        "hsdp": ((2, 2), ("replicate", "shard")),
        "fsdp_tp": ((2, 2), ("dp", "tp")),
    }[placement]
    mesh = self.mesh(*mesh)
    if placement in ("tp", "fsdp_tp"):
      tp = mesh["tp"]
      swapped = {}
      for path, parameter in root.named_parameters():
        cut = cuts[path]
        if cut != "-":
          where = placement_types.Replicate() if cut == "R" else placement_types.Shard(int(cut[2]))
          swapped[parameter] = torch.nn.Parameter(distribute_tensor(parameter.detach(), tp, [where], src_data_rank=None))
      for module in root.modules():
        for name, parameter in module._parameters.items():
          if parameter in swapped:
            module.register_parameter(name, swapped[parameter])
    if placement != "tp":
      scalars = {p for p in root.parameters() if p.dim() == 0}
      fully_shard(root, mesh=mesh["dp"] if placement == "fsdp_tp" else mesh, ignored_params=scalars or None)

  # Values.

  def pattern(self, tag, shape, dtype):
    count = 1
    for extent in shape:
      count *= extent
    numbers = (torch.arange(count, dtype=torch.int64) * 17 + zlib.crc32(tag.encode())) % MODULUS[dtype_name(dtype)]
    return numbers.to(dtype).reshape(tuple(shape))

  def like(self, tag, tensor):
    """A new tensor with the pattern, distributed as `tensor` is."""
    whole = self.pattern(tag, tensor.shape, tensor.dtype)
    if isinstance(tensor, DTensor):
      return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return whole

  def fill(self, tag, tensor):
    values = self.like(tag, tensor)
    with torch.no_grad():
      if isinstance(tensor, DTensor):
        tensor.to_local().copy_(values.to_local())
      else:
        tensor.copy_(values)

  def side(self, c, side, state, order="same"):
    """Model and optimizers of side "A" or "B"."""
    model, cuts = self.build(c, CAST[c["cast"]] if side == "B" else {})
    self.place(c, model, cuts)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
      self.fill(side + "/" + name, tensor)
    named = list(model.named_parameters())
    first = named[0][1]
    if c["frozen"] != "no":
      first.requires_grad_(False)
    optimizers = []
    spec = configurations.OPTIMIZERS[c["optimizer"]]
    if spec is None:
      return model, optimizers
    kind, entries = spec[:2]
    hyper = {}
    for item in spec[2 if side == "A" else 3].split():
      key, value = item.split("=")
      if value in ("True", "False"):
        hyper[key] = value == "True"
      else:
        numbers = tuple(float(v) for v in value.split(","))
        hyper[key] = numbers[0] if len(numbers) == 1 else numbers
    half = (len(named) + 1) // 2
    everything = [p for _, p in named]
    halves = [everything[:half], everything[half:]]
    swap = order == "swapped"
    if c["groups"] in ("one", "reversed", "subset"):
      params = halves[0] if c["groups"] == "subset" else everything
      if (c["groups"] == "reversed") != swap:
        params = params[::-1]
      lists = [[{"params": params}]]
    elif c["groups"] in ("two", "two_explicit"):
      own = {"lr": hyper["lr"] / 4}
      if c["groups"] == "two_explicit":
        own = {"weight_decay": 0.75, "lr": hyper["lr"] / 8}
      lists = [[{"params": halves[0]}, {"params": halves[1], **own}]]
      if swap:
        lists[0].reverse()
    else:
      lists = [[{"params": part}] for part in (halves[::-1] if swap else halves)]
    for groups in lists:
      optimizers.append(getattr(torch.optim, kind)(groups, **hyper))
    names = {p: n for n, p in named}
    for optimizer in optimizers:
      for group in optimizer.param_groups:
        for p in group["params"]:
          if state == "untouched" or (state == "partial" and p is everything[-1]):
            continue
          if p is first and c["frozen"] == "fresh" or not entries:
            continue
          optimizer.state[p] = {
              e: torch.tensor(3.0 if side == "A" else 5.0)
              if e == "step" else self.like("%s/%s/%s" % (side, names[p], e), p) for e in entries
          }
    return model, optimizers

  # Text.

  def tensor_text(self, tensor):
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
      local = tensor.to_local()
      where = ",".join(self.placement_text(p) for p in tensor.placements)
      text = "distributed %s %s mesh[%s] %s local %s" % (dtype_name(tensor.dtype), self.shape_text(tensor), ", ".join(
          map(str, tensor.device_mesh.shape)), where, self.shape_text(local))
    else:
      local = tensor
      text = "tensor %s %s" % (dtype_name(tensor.dtype), self.shape_text(tensor))
    flat = local.contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return "%s %08x" % (text, zlib.crc32(data))

  def shape_text(self, tensor):
    return "[%s]" % ", ".join(map(str, tensor.shape))

  def placement_text(self, placement):
    if isinstance(placement, placement_types._StridedShard):
      return "SS(%d, %d)" % (placement.dim, placement.split_factor)
    return "S(%d)" % placement.dim if placement.is_shard() else "R"

  def value_text(self, value):
    if isinstance(value, torch.Tensor):
      return self.tensor_text(value)
    if isinstance(value, (list, tuple)):
      text = ", ".join(self.value_text(v) for v in value)
      return "(%s)" % text if isinstance(value, tuple) else "[%s]" % text
    if isinstance(value, float):
      return "float %.17g" % value
    return "None" if value is None else "%s %s" % (type(value).__name__, value)

  def lines(self, value, path=""):
    """Dicts and lists of dicts are descended."""
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
      value = dict(enumerate(value))
    if not isinstance(value, dict):
      return [path + " " + self.value_text(value)]
    if not value:
      return [path + " {}"] if path else []
    return [line for k, v in value.items() for line in self.lines(v, "%s/%s" % (path, k) if path else str(k))]

  def raw_model(self, model):
    return self.lines(torch.nn.Module.state_dict(model))

  def raw_optimizers(self, model, optimizers):
    names = {p: n for n, p in model.named_parameters()}
    lines = []
    for o, optimizer in enumerate(optimizers):
      for g, group in enumerate(optimizer.param_groups):
        named = {k: v for k, v in group.items() if k != "params"}
        named["params"] = [names[p] for p in group["params"]]
        lines += self.lines(named, "optimizer %d group %d" % (o, g))
        for p in group["params"]:
          if optimizer.state.get(p):
            lines += self.lines(dict(optimizer.state[p]), "optimizer %d state %s" % (o, names[p]))
    return lines

  # The two calls.

  def attempt(self, call):
    """["ok", ...] or one line that says which exception there was; and what the call returned."""
    try:
      return ["ok"], call()
    except Exception as e:  # pylint: disable=broad-except
      text = " ".join(str(e).split())
      return ["raised %s: %s" % (type(e).__name__, text[:150])], None

  def joined(self, c, model_call, optimizer_call, both_call, optimizers):
    """Results of the calls for model and optimizers; (lines, value) for each."""
    if c["api"] == "both":
      status, value = self.attempt(both_call)
      return (status, value and value[0]), (status, value and value[1])
    return self.attempt(model_call), self.attempt(optimizer_call) if optimizers else (["ok"], {})

  def get(self, c):
    model, optimizers = self.side(c, "A", c["state"])
    options = dcp_state.StateDictOptions(
        full_state_dict=c["get_full"],
        cpu_offload=c["get_offload"],
        ignore_frozen_params=c["ignore_frozen"],
        strict=c["get_strict"],
        broadcast_from_rank0=c["get_broadcast"],
        flatten_optimizer_state_dict=c["get_flat"])
    results = self.joined(
        c, lambda: dcp_state.get_model_state_dict(model, options=options),
        lambda: dcp_state.get_optimizer_state_dict(model, optimizers, options=options),
        lambda: dcp_state.get_state_dict(model, optimizers, options=options), optimizers)
    return [status + ([] if value is None else self.lines(value)) for status, value in results]

  def edit(self, c, model, model_dict, optimizer_dict):
    if c["edit"] in ("drop", "drop_and_extra"):
      model_dict.pop(list(torch.nn.Module.state_dict(model))[1], None)
    if c["edit"] in ("extra", "drop_and_extra"):
      model_dict["gone.weight"] = torch.ones(3)
    if c["edit"] == "shape":
      model_dict[list(model_dict)[0]] = torch.ones(7, 7, 7)
    if not optimizer_dict:
      return
    nested = "state" in optimizer_dict
    if c["edit"] == "drop_state" and nested and optimizer_dict["state"]:
      del optimizer_dict["state"][max(optimizer_dict["state"], key=lambda name: name + ".")]
    elif c["edit"] == "drop_state" and not nested:
      keys = sorted(k for k in optimizer_dict if k.startswith("state."))
      for key in keys:
        if key.startswith(keys[-1].rpartition(".")[0] + "."):
          del optimizer_dict[key]
    if c["edit"] == "extra_state":
      if nested:
        optimizer_dict["state"]["gone.weight"] = {"step": torch.tensor(1.0)}
        optimizer_dict["param_groups"][0]["params"].append("gone.weight")
      else:
        optimizer_dict["state.gone.weight.step"] = torch.tensor(1.0)
        optimizer_dict["param_groups.gone.weight.lr"] = 0.5

  def lacks_nothing_that_is_needed(self, c):
    """Whether only the second name of a tensor is missing, or a momentum buffer, which there is not always."""
    if c["edit"] == "drop":
      return c["model"] in ("tied", "shared") and not (c["ignore_frozen"] and c["frozen"] != "no")
    return c["edit"] == "drop_state" and c["optimizer"] == "sgd_momentum"

  def set(self, c, plainly=False):
    """`plainly`: the way that works in Python. Whether a call failed, and the results."""
    shards = plainly or c["set_from"] == "shards"
    flat = c["set_form"] != "nested"
    if plainly:
      flat = (flat or c["optimizer"] == "sgd") and c["edit"] != "drop_state"
    strict = c["set_strict"] and not (plainly and self.lacks_nothing_that_is_needed(c))
    model, optimizers = self.side(c, "A", "stepped")
    options = dcp_state.StateDictOptions(
        full_state_dict=not shards, ignore_frozen_params=c["ignore_frozen"], flatten_optimizer_state_dict=flat)
    model_dict = dcp_state.get_model_state_dict(model, options=options)
    optimizer_dict = dcp_state.get_optimizer_state_dict(model, optimizers, options=options) if optimizers else {}
    # Python sends the bytes of other strides as they lie.
    model_dict = {k: v if isinstance(v, DTensor) else v.detach().clone().contiguous() for k, v in model_dict.items()}
    self.edit(c, model, model_dict, optimizer_dict)

    model, optimizers = self.side(c, "B", c["live"], c["order"])
    broadcast = not plainly and c["set_from"] == "broadcast"
    if broadcast and c["api"] == "apart" and self.rank != 0:
      model_dict, optimizer_dict = {}, {}
    options = dcp_state.StateDictOptions(
        full_state_dict=not shards,
        cpu_offload=not plainly and c["set_offload"],
        ignore_frozen_params=c["ignore_frozen"],
        strict=strict,
        broadcast_from_rank0=broadcast,
        flatten_optimizer_state_dict=not plainly and c["set_form"] == "flat_flag")

    def both():
      keys = dcp_state.set_state_dict(
          model, optimizers, model_state_dict=model_dict, optim_state_dict=optimizer_dict, options=options)
      return keys, None

    results = self.joined(
        c, lambda: dcp_state.set_model_state_dict(model, model_dict, options=options),
        lambda: dcp_state.set_optimizer_state_dict(model, optimizers, optimizer_dict, options=options), both, optimizers)
    (model_status, keys), (optimizer_status, _) = results
    failed = [model_status != ["ok"], optimizer_status != ["ok"]]
    if not failed[0]:
      model_status = ["ok", "missing %s" % sorted(keys.missing_keys), "unexpected %s" % sorted(keys.unexpected_keys)]
      model_status += self.raw_model(model)
    if not failed[1] and optimizers:
      optimizer_status = ["ok"] + self.raw_optimizers(model, optimizers)
    return any(failed), [model_status, optimizer_status]

  def run(self, c):
    results = {"get": self.get(c)}
    failed, results["set"] = self.set(c)
    # All ranks or none: it is collective.
    if self.world:
      failure = torch.tensor([int(failed)])
      dist.all_reduce(failure)
      failed = bool(failure)
    full_twice = c["model"] == "shared" and c["placement"] != "plain" and c["set_from"] != "shards"
    if failed or full_twice or (c["optimizer"] == "sgd" and c["set_form"] == "nested"):
      results["path"] = self.set(c, plainly=True)[1]
    return results


def work(rank, world, jobs_file, out_file):
  """What a process of one rank does. World 0: no process group."""
  warnings.simplefilter("ignore")
  worker = Worker(rank, world)
  logging.disable(logging.WARNING)
  if world:
    dist.init_process_group(
        "gloo",
        init_method="file://%s_store" % jobs_file,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60))
  with open(jobs_file, "rb") as jobs:
    numbered = pickle.load(jobs)
  results = {}
  for number, c in numbered:
    try:
      results[number] = worker.run(c)
    except Exception as e:
      raise RuntimeError("configuration %d: %s" % (number, configurations.to_text(c))) from e
  with open(out_file, "wb") as out:
    pickle.dump(results, out)
  if world:
    dist.barrier()
  # gloo's threads may abort a process that ends in the ordinary way.
  sys.stdout.flush()
  os._exit(0)


def run_all(chosen):
  """{number: [results of rank 0, ...]}"""
  by_world = collections.defaultdict(list)
  for number, c in enumerate(chosen):
    by_world[c["world"]].append((number, c))
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    for world_name, numbered in sorted(by_world.items()):
      world = 0 if world_name == "none" else int(world_name)
      jobs = os.path.join(folder, "jobs_" + world_name)
      with open(jobs, "wb") as out:
        pickle.dump(numbered, out)
      files = [os.path.join(folder, "%s_%d" % (world_name, rank)) for rank in range(max(world, 1))]
      environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
      processes = [
          subprocess.Popen([sys.executable, "-s", os.path.abspath(__file__), "work", str(rank), str(world), jobs, f],
                           env=environment) for rank, f in enumerate(files)
      ]
      try:
        codes = [p.wait(timeout=600) for p in processes]
      finally:
        for p in processes:
          p.kill()
      if any(codes):
        raise RuntimeError("ranks of world %s ended with %s" % (world_name, codes))
      for rank, f in enumerate(files):
        with open(f, "rb") as data:
          for number, result in pickle.load(data).items():
            results.setdefault(number, []).append(result)
  return results


def write(path, chosen, results):
  blocks = {}

  def block(lines):
    return blocks.setdefault(tuple(lines), len(blocks))

  body = []
  for number, c in enumerate(chosen):
    body.append("config %d %s" % (number, configurations.to_text(c)))
    for rank, result in enumerate(results[number]):
      for verb, parts in result.items():
        body.append("%s %d %d %d" % (verb, rank, block(parts[0]), block(parts[1])))
  with open(path, "w", encoding="utf-8") as out:
    out.write(HEADER)
    for name, lines in configurations.MODELS.items():
      out.write("".join("model %s %s\n" % (name, line) for line in lines))
    for name, spec in configurations.OPTIMIZERS.items():
      if spec is not None:
        kind, entries, saved, live = spec
        out.write("optimizer %s class %s\noptimizer %s state %s\noptimizer %s A %s\noptimizer %s B %s\n" %
                  (name, kind, name, " ".join(entries), name, saved, name, live))
    out.write("\n".join(body) + "\n")
    for lines, number in blocks.items():
      out.write("block %d\n%s\n" % (number, "\n".join("|" + line for line in lines)))


def read(path):
  """The configurations of a golden file, and its blocks."""
  chosen, blocks, uses = [], {}, collections.defaultdict(list)
  with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as golden:
    for line in golden.read().splitlines():
      words = line.split()
      if line.startswith("config "):
        values = dict(w.split("=") for w in words[2:])
        chosen.append({a: {"yes": True, "no": False}.get(v, v) if True in configurations.AXES[a] else v
                       for a, v in values.items()})
      elif line.startswith(("get ", "set ", "path ")):
        uses[len(chosen) - 1].append(words)
      elif line.startswith("block "):
        current = blocks[words[1]] = []
      elif line.startswith("|"):
        current.append(line[1:])
  return chosen, blocks, uses


def print_coverage(chosen):
  table = configurations.coverage(chosen)
  for (a, b), (covered, possible) in table.items():
    print("%-14s %-14s %3d of %3d" % (a, b, covered, possible))
  if any(covered < possible for covered, possible in table.values()):
    raise RuntimeError("some pairs of values are in no configuration")


def main():
  verb = sys.argv[1]
  if verb == "work":
    rank, world = (int(a) for a in sys.argv[2:4])
    work(rank, world, sys.argv[4], sys.argv[5])
  elif verb == "show":
    chosen, blocks, uses = read(sys.argv[2])
    print(configurations.to_text(chosen[int(sys.argv[3])]))
    for name, rank, *numbers in uses[int(sys.argv[3])]:
      for part, number in zip(("model", "optimizers"), numbers):
        print("%s, rank %s, %s:\n  %s" % (name, rank, part, "\n  ".join(blocks[number])))
  else:
    chosen = configurations.select(560) if verb == "generate" else read(sys.argv[2])[0]
    print_coverage(chosen)
    write(sys.argv[-1], chosen, run_all(chosen))


if __name__ == "__main__":
  main()
