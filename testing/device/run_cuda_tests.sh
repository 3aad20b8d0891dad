#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the CUDA tests and their table of timings on a machine with a GPU and an installed PyTorch with CUDA, whose
# libraries they use; neither Bazel nor this repository's build is needed there.
#
# usage: run_cuda_tests.sh TEST_BINARY [gtest flags]
#
# $NCCL: a libnccl.so.2 instead of PyTorch's; from 2.30 several ranks may share the device, so that their tests run, too.
# Build the binary elsewhere: ./bazelw build --config=cuda --config=opt --strip=always //testing/device/cuda:cuda_test
# The torch package is that of $DSD_PYTHON, else of python3. Exit status: of the tests.

set -euo pipefail
binary=$1
shift

torch=$("${DSD_PYTHON:-python3}" -c '
import importlib.util
print(importlib.util.find_spec("torch").submodule_search_locations[0])')
libraries=$torch/lib
for folder in "$torch"/../nvidia/*/lib; do
  if [[ -d $folder ]]; then libraries+=:$folder; fi
done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

export NCCL_SOCKET_IFNAME=lo  # no other machine takes part
if [[ -n ${NCCL:-} ]]; then
  export LD_PRELOAD=$NCCL NCCL_MULTI_RANK_GPU_ENABLE=1
fi

chmod +x "$binary"
if missing=$(ldd "$binary" | grep 'not found'); then
  echo "libraries are missing next to $torch:" >&2
  echo "$missing" >&2
  exit 1
fi
exec "$binary" "$@"
