#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests of the NCCL backend on the CUDA device of this machine, with
# the libraries that python3's PyTorch uses, and again with those of a newer
# NCCL where one is given: from 2.30 several ranks may share the device, so that
# the whole conformance suite runs on one.
#
#   usage: run_nccl_tests.sh FOLDER [NCCL]
#
# FOLDER: holds the programs conformance_test_nccl and nccl_device_test, built
# elsewhere (build_nccl_tests.sh). NCCL: a libnccl.so.2, or one as .xz.
# Ends with a line per part, and with 1 if one failed.
set -uo pipefail

folder=$(cd "$1" && pwd)
other_nccl=${2:-}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The files of a package of NVIDIA's that python3 has, the first that matches.
find_in_python() {
  python3 - "$1" <<'PYTHON'
import glob
import os
import site
import sys
import sysconfig

places = [sysconfig.get_path("purelib"), *site.getsitepackages(), *sys.path]
for place in places:
    found = sorted(glob.glob(os.path.join(place, "nvidia", "*", "lib", sys.argv[1])))
    if found:
        print(found[-1])
        break
PYTHON
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
cudart=$(find_in_python 'libcudart.so.1[23]')
nccl=$(find_in_python 'libnccl.so.2')
echo "CUDA runtime: ${cudart:-of the system}; NCCL: ${nccl:-of the system}"
[[ -n $cudart ]] && export DSD_CUDART_LIBRARY=$cudart

# No other machine takes part.
export NCCL_SOCKET_IFNAME=lo
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

results=()
failed=0
run() { # <name> <seconds> <program> <arguments...>
  local name=$1 limit=$2 log=$scratch/log start=$SECONDS
  shift 2
  echo "=== $name"
  timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1
  local rc=$?
  # Each line once: tests are skipped by the hundred for one reason.
  grep -vE '^\[ +(RUN|OK) |^\[-+\]|^\[  SKIPPED \]|^$' "$log" |
    awk '!seen[$0]++' | tail -n 150
  local passed skipped
  passed=$(grep -cE '^\[ +OK ' "$log")
  skipped=$(grep -cE '^\[  SKIPPED \].*ms\)' "$log")
  results+=("$name: exit $rc, $passed passed, $skipped skipped, $((SECONDS - start)) s")
  [[ $rc -eq 0 ]] || failed=1
  if [[ -n ${OUT:-} ]]; then cp "$log" "$OUT/${name//[^A-Za-z0-9_.-]/_}.log"; fi
}

# All limits together are below ten minutes.
run "own NCCL: device tests" 90 \
  env DSD_NCCL_LIBRARY="$nccl" "$folder/nccl_device_test"
run "own NCCL: conformance" 45 \
  env DSD_NCCL_LIBRARY="$nccl" "$folder/conformance_test_nccl"

if [[ -n $other_nccl ]]; then
  if [[ $other_nccl == *.xz ]]; then
    python3 - "$other_nccl" "$scratch/libnccl.so.2" <<'PYTHON'
import lzma
import shutil
import sys

with lzma.open(sys.argv[1]) as packed, open(sys.argv[2], "wb") as out:
    shutil.copyfileobj(packed, out, 1 << 24)
PYTHON
    other_nccl=$scratch/libnccl.so.2
  fi
  export NCCL_MULTI_RANK_GPU_ENABLE=1
  run "other NCCL: device tests" 120 \
    env DSD_NCCL_LIBRARY="$other_nccl" "$folder/nccl_device_test"
  run "other NCCL: conformance on device memory" 220 \
    env DSD_NCCL_LIBRARY="$other_nccl" "$folder/conformance_test_nccl" \
    "--gtest_filter=${DEVICE_CASES:-*evice*_2:*evice*_4}"
  run "other NCCL: conformance on host memory" 60 \
    env DSD_NCCL_LIBRARY="$other_nccl" "$folder/conformance_test_nccl" \
    "--gtest_filter=*ToAllWithItself_2:*LanesOfTwo*_2:*AbortFrom*_2:*OfFloats_2:*DoesNotCall_2"
fi

echo "=== results"
printf '%s\n' "${results[@]}"
exit $failed
