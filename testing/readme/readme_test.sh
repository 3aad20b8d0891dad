#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the README's program and looks at what it saved; holds the README to what
# it says about itself.
set -euo pipefail
example=$PWD/$1 dsd=$2 readme=$3 deps=$4

(cd "$TEST_TMPDIR" && "$example")
"$dsd" ls "$TEST_TMPDIR/checkpoint" | tee "$TEST_TMPDIR/ls"
grep -q 'weight' "$TEST_TMPDIR/ls"
"$dsd" verify "$TEST_TMPDIR/checkpoint"

lines=$(sed -n '/^```cpp$/,/^```$/p' "$readme" | sed '/^```/d' | grep -c .)
echo "the example has $lines lines"
[ "$lines" -le 20 ]
grep -qF "deps = [$deps]," "$readme"
grep -qF './bazelw run //examples:train_digits' "$readme"
grep -qF './bazelw test //...' "$readme"
