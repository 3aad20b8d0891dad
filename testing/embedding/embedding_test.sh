#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a second workspace, builds a program there against @dsd and runs it, once
# with each backend as the default.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
root=$here
while [ ! -e "$root/WORKSPACE" ]; do root=$(dirname "$root"); done

space=$TEST_TMPDIR/embedder
mkdir -p "$space/own_xxhash"
sed "s#@DSD@#$root#" "$here/workspace/WORKSPACE.in" > "$space/WORKSPACE"
cp "$here/workspace/BUILD.in" "$space/BUILD.bazel"
cp "$here/workspace/embedded.cc" "$space/"

# The embedder's own copy of a dependency: the same library, recognizably theirs.
for header in /usr/include/xxhash.h /usr/include/xxh3.h; do
  [ -e "$header" ] && cp "$header" "$space/own_xxhash/"
done
touch "$space/own_xxhash/WORKSPACE"
cat > "$space/own_xxhash/BUILD.bazel" <<'BUILD'
cc_library(
    name = "xxhash",
    hdrs = glob(["*.h"]),
    defines = ["XXH_INLINE_ALL", "EMBEDDER_XXHASH"],
    includes = ["."],
    visibility = ["//visibility:public"],
)
BUILD

# All that an embedder has to say.
cat > "$space/.bazelrc" <<'RC'
build --cxxopt=-std=c++17 --host_cxxopt=-std=c++17
RC

# The output base is kept between runs; the disk cache is the one of this
# project's other builds.
cache=${XDG_CACHE_HOME:-${HOME:-/var/tmp}/.cache}/dsd
bazel=(bazel --output_base="$cache/embedding-test")
disk=(--disk_cache="${DSD_DISK_CACHE:-$cache/bazel-disk}")
cd "$space"
trap '"${bazel[@]}" shutdown > /dev/null 2>&1 || true' EXIT

for backend in gloo local; do
  "${bazel[@]}" build "${disk[@]}" --jobs=2 --noshow_progress \
    "--@dsd//backends:default=$backend" //:embedded
  ./bazel-bin/embedded | tee "$TEST_TMPDIR/out"
  grep -qx 'status: OK' "$TEST_TMPDIR/out"
  grep -q "^backends:.* $backend" "$TEST_TMPDIR/out"
done

# A wrong name is refused, and the text says what is there.
if "${bazel[@]}" build --noshow_progress \
    --@dsd//backends:default=carrier_pigeon //:embedded 2> "$TEST_TMPDIR/err"; then
  echo "a backend that does not exist was accepted"
  exit 1
fi
grep -q 'gloo' "$TEST_TMPDIR/err"
echo "embedding works"
