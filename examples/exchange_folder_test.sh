#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# A relative folder is the user's, who stands elsewhere under `bazel run`.
set -euo pipefail
exchange=$PWD/$1
cd /
BUILD_WORKING_DIRECTORY=$TEST_TMPDIR "$exchange" models
test -e "$TEST_TMPDIR/models/model/.metadata"
test -e "$TEST_TMPDIR/models/model.safetensors"
BUILD_WORKING_DIRECTORY=/nowhere "$exchange" "$TEST_TMPDIR/others"
test -e "$TEST_TMPDIR/others/model.pt"
cd "$TEST_TMPDIR"
"$exchange" own
test -e own/model.pt
