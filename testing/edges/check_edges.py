#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the dependency edges between the rooms of the house.

usage: check_edges.py GRAPH CLI_DEPS ANY_FILE_OF_THE_WORKSPACE

GRAPH is `bazel query --output=graph` over all library and program targets,
CLI_DEPS the dependencies of the `dsd` program. Fails with every edge that is not
allowed, with every package that the graph lacks, and if the program or the
middle of the house reaches LibTorch.
"""

import os
import re
import sys

# Room -> rooms it may depend on directly; their own rooms come with them.
ALLOWED = {
    "core/base": [],
    "core/layout": ["core/base"],
    "core/plan": ["core/layout"],
    "core/comm": ["core/base"],
    "core/value": ["core/base"],
    "core/fqn": ["core/base"],
    "core/transfer": ["core/layout", "core/plan", "core/comm"],
    "core/tensor": ["core/transfer"],
    "core/state_dict": ["core/tensor", "core/fqn", "core/value", "core/plan"],
    "backends": ["core/base", "core/comm"],
    # Works over a process group of LibTorch's.
    "backends/c10d": ["core/comm", "core/tensor"],
    "frontends/module": ["core/state_dict"],
    "frontends/optimizer": ["core/state_dict"],
    "frontends/script": ["core/state_dict"],
    "frontends/parallel": ["frontends/module"],
    "frontends/checkpoint": ["core/transfer", "core/value"],
    # The facade joins modules, optimizers and files.
    "frontends/torch": [
        "frontends/module",
        "frontends/optimizer",
        "frontends/checkpoint",
    ],
    "frontends/cli": ["frontends/checkpoint"],
}

# Rooms that must not reach LibTorch.
NO_LIBTORCH = ["core/base", "core/layout", "core/plan", "core/comm",
               "core/value", "core/fqn", "core/transfer", "backends",
               "frontends/checkpoint", "frontends/cli"]


def room_of(package):
    """The longest room that is the package or a folder above it."""
    fitting = [r for r in ALLOWED if (package + "/").startswith(r + "/")]
    return max(fitting, key=len) if fitting else None


def closure(room):
    seen = {room}
    todo = [room]
    while todo:
        for other in ALLOWED[todo.pop()]:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def read_edges(path):
    edges = []
    nodes = set()
    with open(path, encoding="utf-8") as graph:
        for line in graph:
            labels = re.findall(r'"([^"]+)"', line)
            if "->" in line and len(labels) == 2:
                edges += [(a, b) for a in labels[0].split("\\n")
                          for b in labels[1].split("\\n")]
            for label in labels:
                nodes.update(label.split("\\n"))
    return nodes, edges


def package_of(label):
    return label.split("//", 1)[1].split(":", 1)[0]


def main():
    graph_path, cli_path, witness = sys.argv[1:4]
    nodes, edges = read_edges(graph_path)
    errors = []
    checked = 0
    for source, target in edges:
        a = room_of(package_of(source)) if source.startswith("//") else None
        if a is None:
            continue
        if target.startswith("@libtorch"):
            checked += 1
            if a in NO_LIBTORCH:
                errors.append(f"{source} -> {target}: {a} is free of LibTorch")
            continue
        if not target.startswith("//"):
            continue
        b = room_of(package_of(target))
        checked += 1
        if b is None:
            if not package_of(target).startswith("third_party"):
                errors.append(f"{source} -> {target}: not a room")
        elif b not in closure(a):
            errors.append(f"{source} -> {target}: {a} may not depend on {b}")

    # A package that nobody lists would not be checked at all.
    root = os.path.dirname(os.path.realpath(witness))
    while not os.path.exists(os.path.join(root, "WORKSPACE")):
        root = os.path.dirname(root)
    packages = {package_of(n) for n in nodes if n.startswith("//")}
    for top in ("core", "backends", "frontends"):
        for folder, _, files in os.walk(os.path.join(root, top)):
            package = os.path.relpath(folder, root)
            if "BUILD.bazel" in files and package not in packages:
                errors.append(f"//{package} is in no list of testing/edges")

    with open(cli_path, encoding="utf-8") as deps:
        reached = deps.read().split()
    if not reached:
        errors.append("the dependencies of the dsd program are unknown")
    errors += [f"the dsd program reaches {d}" for d in reached if "libtorch" in d]

    for error in errors:
        print(error)
    print(f"{checked} edges checked, {len(errors)} errors")
    return 1 if errors or checked < 20 else 0


if __name__ == "__main__":
    sys.exit(main())
