# SPDX-License-Identifier: Apache-2.0
"""Which configurations the oracle compares: models, optimizers, and a selection of all combinations of the axes below.

The golden file repeats MODELS and OPTIMIZERS, so that the C++ side builds what is written there and has no list of its own.
"""

import itertools
import random

# "path class arguments dtype placements": placements of the parameters, in order of registration, where tensor parallelism
# cuts; "-" leaves a tensor plain. Loose has tensors of any shape, "name=3x4", buffers as "name=3x4:dtype". "tie a b" makes
# parameter a the same tensor as b, "share a b" module a the same module as b.
MODELS = {
    "even": [
        "fc1 Linear 8,16 float32 S(0) S(0)",
        "fc2 Linear 16,8 float32 S(1) R",
    ],
    "uneven": [
        "fc1 Linear 5,7 float32 S(0) S(0)",
        "fc2 Linear 7,3 float32 S(1) R",
    ],
    "wide": [
        "up Linear 13,11 float32 S(1) S(0)",
        "down.inner Linear 11,17 float32 S(0) R",
    ],
    "tiny": [
        "a Linear 1,1 float32 S(0) R",
        "b Linear 3,1 float32 S(1) R",
        "c Linear 2,2 float32 S(1) S(0)",
    ],
    "embedding": [
        "tokens Embedding 10,6 float32 S(0)",
        "head Linear 6,5 float32 S(1) R",
    ],
    "tied": [
        "tokens Embedding 9,4 float32 S(0)",
        "decoder Linear 4,9,nobias float32 S(0)",
        "tail Linear 4,3 float32 S(1) R",
        "tie decoder.weight tokens.weight",
    ],
    "shared": [
        "first Linear 3,5 float32 S(0) S(0)",
        "middle Linear 5,3 float32 S(1) R",
        "share last first",
    ],
    "conv": [
        "conv Conv2d 3,6,2 float32 S(0) S(0)",
        "norm BatchNorm2d 6 float32 R R",
        "fc Linear 6,10 float32 S(1) R",
    ],
    "nested": [
        "blocks.0.attn.q Linear 4,6 float32 S(0) S(0)",
        "blocks.0.norm LayerNorm 6 float32 R R",
        "blocks.1.attn.q Linear 6,5 float32 S(0) S(0)",
        "blocks.1.norm LayerNorm 5 float32 R R",
        "module.head Linear 5,2,nobias float32 S(1)",
    ],
    "zero": [
        "none Loose rows=0x4 columns=3x0:float32 float32 S(0)",
        "fc Linear 3,5 float32 S(0) S(0)",
    ],
    "scalar": [
        "scale Loose value= one=1 deep=2x3x5 float32 - R S(2)",
        "fc Linear 4,6 float32 S(0) S(0)",
    ],
    "mixed": [
        "f32 Linear 6,5 float32 S(0) S(0)",
        "f64 Linear 5,3 float64 S(1) R",
        "bf16 Linear 3,7 bfloat16 S(0) S(0)",
        "f16 Linear 7,2 float16 S(1) R",
    ],
    "buffers": [
        "fc Linear 6,9 float32 S(0) S(0)",
        "state Loose gain=5 count=:int64 mask=7:bool table=3x4:float64 bytes=9:uint8 float32 S(0)",
    ],
}

# Class; state entries besides "step"; hyperparameters of the saved optimizer and of the one that is set. All numbers are exact
# in binary.
OPTIMIZERS = {
    "none": None,
    "sgd": ("SGD", [], "lr=0.25 momentum=0.0 dampening=0.0 weight_decay=0.125 nesterov=False",
            "lr=0.5 momentum=0.0 dampening=0.0 weight_decay=0.0 nesterov=False"),
    "sgd_momentum": ("SGD", ["momentum_buffer"], "lr=0.25 momentum=0.5 dampening=0.25 weight_decay=0.125 nesterov=False",
                     "lr=0.5 momentum=0.75 dampening=0.0 weight_decay=0.0 nesterov=True"),
    "adam": ("Adam", ["step", "exp_avg", "exp_avg_sq"],
             "lr=0.25 betas=0.5,0.75 eps=0.0009765625 weight_decay=0.125 amsgrad=False",
             "lr=0.5 betas=0.875,0.9375 eps=0.03125 weight_decay=0.0 amsgrad=False"),
    "adam_amsgrad": ("Adam", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
                     "lr=0.25 betas=0.5,0.75 eps=0.0009765625 weight_decay=0.0 amsgrad=True",
                     "lr=0.5 betas=0.875,0.9375 eps=0.03125 weight_decay=0.25 amsgrad=True"),
    "adamw": ("AdamW", ["step", "exp_avg", "exp_avg_sq"],
              "lr=0.25 betas=0.5,0.75 eps=0.0009765625 weight_decay=0.125 amsgrad=False",
              "lr=0.5 betas=0.875,0.9375 eps=0.03125 weight_decay=0.0 amsgrad=False"),
    "adagrad": ("Adagrad", ["step", "sum"],
                "lr=0.25 lr_decay=0.125 weight_decay=0.125 initial_accumulator_value=0.5 eps=0.0009765625",
                "lr=0.5 lr_decay=0.0 weight_decay=0.0 initial_accumulator_value=0.25 eps=0.03125"),
    "rmsprop": ("RMSprop", ["step", "square_avg"],
                "lr=0.25 alpha=0.5 eps=0.0009765625 weight_decay=0.125 momentum=0.0 centered=False",
                "lr=0.5 alpha=0.75 eps=0.03125 weight_decay=0.0 momentum=0.0 centered=False"),
    "rmsprop_centered": ("RMSprop", ["step", "square_avg", "momentum_buffer", "grad_avg"],
                         "lr=0.25 alpha=0.5 eps=0.0009765625 weight_decay=0.0 momentum=0.5 centered=True",
                         "lr=0.5 alpha=0.75 eps=0.03125 weight_decay=0.125 momentum=0.25 centered=True"),
}

AXES = {
    "model": list(MODELS),
    "optimizer": list(OPTIMIZERS),
    # How many ranks; "none" is a world without a process group.
    "world": ["none", "1", "2", "4"],
    # Plain tensors; fully_shard; tensor parallelism; fully_shard on a mesh of (2, 2); fully_shard over tensor parallelism.
    "placement": ["plain", "fsdp", "tp", "hsdp", "fsdp_tp"],
    # One group; one with the parameters reversed; two with learning rates of their own; two, the second one with
    # hyperparameters named in another order than the class has them; one that lacks half of the parameters; two optimizers.
    "groups": ["one", "reversed", "two", "two_explicit", "subset", "two_optimizers"],
    # State of all parameters, of none, of all but the last.
    "state": ["stepped", "untouched", "partial"],
    # The first parameter: trained, frozen before the first step, frozen later.
    "frozen": ["no", "fresh", "stepped"],
    # One call for model and optimizers, or one for each.
    "api": ["both", "apart"],
    "get_full": [False, True],
    "get_offload": [False, True],
    "get_flat": [False, True],
    "get_broadcast": [False, True],
    "get_strict": [True, False],
    "ignore_frozen": [False, True],
    # What is set: shards as the live ones, whole tensors on every rank, whole tensors on rank 0.
    "set_from": ["shards", "full", "broadcast"],
    # Of the optimizer dict; "flat_flag": and the option is set as well.
    "set_form": ["nested", "flat", "flat_flag"],
    "set_offload": [False, True],
    "set_strict": [True, False],
    # What is done to the dicts before they are set: a model key removed, one added, both; the state of a parameter removed,
    # that of an unknown one added; a tensor of another shape.
    "edit": ["no", "drop", "extra", "drop_and_extra", "drop_state", "extra_state", "shape"],
    # The live model's types: as saved; float32 -> bfloat16 and float64 -> float32; float32 -> float64.
    "cast": ["no", "narrow", "wide"],
    # The live optimizer's state before the set, and its parameters: as saved, or groups and parameters in reverse.
    "live": ["stepped", "untouched"],
    "order": ["same", "swapped"],
}

# How often a value is taken where it is free, 1 if not named: what both sides refuse shows little.
_WEIGHTS = {
    ("edit", "no"): 12,
    ("cast", "no"): 4,
    ("frozen", "no"): 2,
    ("state", "stepped"): 2,
    ("placement", "plain"): 0.5,
    ("set_from", "broadcast"): 2,
}

_PLACEMENTS = {
    "none": ["plain"],
    "1": ["plain", "fsdp"],
    "2": ["plain", "fsdp", "tp"],
    "4": ["plain", "fsdp", "tp", "hsdp", "fsdp_tp"],
}

# What other axes are where the optimizer is "none".
_WITHOUT_OPTIMIZER = {
    "groups": "one",
    "state": "stepped",
    "get_flat": False,
    "set_form": "nested",
    "live": "stepped",
    "order": "same",
}


def is_possible(c):
  """Whether Python gives a result at all; `c` may be partial."""

  def of(axis):
    return c.get(axis)

  def known(*axes):
    return all(a in c for a in axes)

  if known("world", "placement") and of("placement") not in _PLACEMENTS[of("world")]:
    return False
  if of("optimizer") == "none":
    if any(of(a) not in (None, v) for a, v in _WITHOUT_OPTIMIZER.items()) or of("edit") in ("drop_state", "extra_state"):
      return False
  # Refused on both sides; one configuration of its own has it.
  if of("get_broadcast") and of("get_full") is False:
    return False
  if of("set_from") == "broadcast":
    # Python needs a process group, and rank 0 alone checks the optimizer's state and shapes: the other ranks would wait for it.
    if of("world") == "none" or of("edit") in ("drop_state", "shape"):
      return False
  return True


def _pairs(c):
  items = list(c.items())
  return {(a, b) for a, b in itertools.combinations(items, 2)}


def _complete(partial, rng):
  """A possible configuration with these values, or None."""
  for _ in range(200):
    c = dict(partial)
    for axis in rng.sample(list(AXES), len(AXES)):
      if axis in c:
        continue
      values = [v for v in AXES[axis] if is_possible({**c, axis: v})]
      if not values:
        break
      c[axis] = rng.choices(values, [_WEIGHTS.get((axis, v), 1) for v in values])[0]
    else:
      return {axis: c[axis] for axis in AXES}
  return None


def _possible_pairs(rng):
  return [((a, x), (b, y))
          for (a, values_a), (b, values_b) in itertools.combinations(AXES.items(), 2)
          for x, y in itertools.product(values_a, values_b)
          if _complete({
              a: x,
              b: y
          }, rng) is not None]


def select(count, seed=1):
  """At least `count` configurations that have every possible pair of values."""
  rng = random.Random(seed)
  possible = _possible_pairs(rng)
  open_pairs = set(possible)
  chosen = []
  for pair in possible:
    while pair in open_pairs:
      candidates = [_complete(dict(pair), rng) for _ in range(12)]
      best = max(candidates, key=lambda c: len(_pairs(c) & open_pairs))
      open_pairs -= _pairs(best)
      chosen.append(best)
  # The rest: many ranks, where most can go wrong.
  while len(chosen) < count:
    start = {"world": "4"} if len(chosen) % 2 else {}
    chosen.append(_complete(start, rng))
  # Refused by both sides.
  chosen.append({**_complete({"world": "1", "get_full": False, "get_broadcast": False}, rng), "get_broadcast": True})
  return chosen


def coverage(chosen):
  """For each two axes: how many pairs of their values there are, and how many are possible."""
  covered = set().union(*(_pairs(c) for c in chosen))
  table = {axes: [0, 0] for axes in itertools.combinations(AXES, 2)}
  for (a, x), (b, y) in _possible_pairs(random.Random(1)):
    table[a, b][0] += ((a, x), (b, y)) in covered
    table[a, b][1] += 1
  return table


def to_text(c):
  def show(v):
    return {True: "yes", False: "no"}.get(v, v) if isinstance(v, bool) else v

  return " ".join("%s=%s" % (axis, show(v)) for axis, v in c.items())
