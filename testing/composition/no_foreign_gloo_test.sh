#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# LibTorch has a Gloo of its own and exports it. Ours has another name, so that
# the two can never be taken for each other, and its functions are not exported.
set -euo pipefail
for file in "$@"; do
  if nm -DC --defined-only "$file" | cut -d' ' -f3- |
      grep -E '(^|[^a-z_])gloo::|^dsd_gloo::'; then
    echo "$file exports symbols of Gloo"
    exit 1
  fi
done
echo "no symbol of Gloo is exported"
