#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds what run_nccl_tests.sh runs, for a machine that has neither Bazel nor
# this repository: programs that need the C and C++ libraries only, without symbols.
#
#   usage: build_nccl_tests.sh FOLDER
set -euo pipefail

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$root"
targets=(
  //backends/nccl:nccl_device_test
  //testing/conformance:conformance_test_nccl
)
./bazelw build --jobs="${JOBS:-2}" "${targets[@]}"
for target in "${targets[@]}"; do
  program=${target#//}
  strip -o "$folder/${program#*:}" "bazel-bin/${program/://}"
done
cp testing/device/run_nccl_tests.sh "$folder"
ls -l "$folder"
