#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a second workspace and builds there against @dsd: a program with each
# backend as the default, a test, and a backend; with the argument `torch` a
# program with LibTorch instead.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
root=$here
while [ ! -e "$root/WORKSPACE" ]; do root=$(dirname "$root"); done

space=$TEST_TMPDIR/embedder
mkdir -p "$space/own_xxhash"
sed "s#@DSD@#$root#" "$here/workspace/WORKSPACE.in" > "$space/WORKSPACE"
cp "$here/workspace/BUILD.in" "$space/BUILD.bazel"
cp "$here"/workspace/*.cc "$space/"

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

bazel=${DSD_BAZEL:-$(command -v bazel)} || {
  echo "there is no bazel in $PATH, the PATH of tests; set DSD_BAZEL to its place"
  exit 1
}
workspace_mode=()
case $("$bazel" --version) in
"bazel 7."*) workspace_mode=(--noenable_bzlmod) ;;
"bazel 8."*) workspace_mode=(--noenable_bzlmod --enable_workspace) ;;
esac

# Tests have no HOME. The caches are those of the user's other builds of this
# project, and the output base is kept between runs.
export HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/dsd
mkdir -p "$cache" 2> /dev/null || cache=$TEST_TMPDIR/cache
startup=(--output_base="$cache/embedding-test")
library=$(realpath "$(find "$TEST_SRCDIR" -name libtorch_cpu.so -print -quit)")
libtorch=${library%/lib/libtorch_cpu.so}
# Flags of this build, so that Abseil, GoogleTest and Gloo come from its cache; dsd, which is compiled anew under another
# name, is not optimized, for speed.
build=(build "${workspace_mode[@]}" --disk_cache="${DSD_DISK_CACHE:-$cache/bazel-disk}" --jobs=2
  --noshow_progress --nosandbox_debug --repo_env=LIBTORCH_ROOT="$libtorch"
  --compilation_mode=opt --copt=-UNDEBUG --host_copt=-DNDEBUG --dynamic_mode=off --force_pic
  --incompatible_strict_action_env --strategy=CppCompile=local
  "--per_file_copt=external/dsd/.*@-O0,-U_FORTIFY_SOURCE")
cd "$space"
trap '"$bazel" "${startup[@]}" shutdown > /dev/null 2>&1 || true' EXIT

if [ "${1:-}" = torch ]; then
  "$bazel" "${startup[@]}" "${build[@]}" //:embedded_torch
  ./bazel-bin/embedded_torch "$TEST_TMPDIR/checkpoint" | tee "$TEST_TMPDIR/out"
  grep -qx 'status: OK' "$TEST_TMPDIR/out"
  test -e "$TEST_TMPDIR/checkpoint/.metadata"
  echo "embedding with LibTorch works"
  exit
fi

for backend in gloo local; do
  "$bazel" "${startup[@]}" "${build[@]}" "--@dsd//backends:default=$backend" //:embedded
  ./bazel-bin/embedded | tee "$TEST_TMPDIR/out"
  grep -qx 'status: OK' "$TEST_TMPDIR/out"
  grep -qx "backends:.* $backend" "$TEST_TMPDIR/out"
done

# A test of theirs, linked as Bazel links tests if nothing is said.
"$bazel" "${startup[@]}" "${build[@]}" --dynamic_mode=default //:embedded_test
./bazel-bin/embedded_test | tee "$TEST_TMPDIR/out"
grep -qx 'status: OK' "$TEST_TMPDIR/out"

# A wrong name is refused, and the text says what is there.
if "$bazel" "${startup[@]}" "${build[@]}" --@dsd//backends:default=carrier_pigeon \
    //:embedded 2> "$TEST_TMPDIR/err"; then
  echo "a backend that does not exist was accepted"
  exit 1
fi
grep -q 'gloo' "$TEST_TMPDIR/err"

# A backend of theirs is the default of a program, and passes the suite that ours pass.
"$bazel" "${startup[@]}" "${build[@]}" --@dsd//backends:default_backend=//:pigeon //:embedded //:pigeon_conformance_test
./bazel-bin/embedded | tee "$TEST_TMPDIR/out"
grep -qx 'backends: pigeon' "$TEST_TMPDIR/out"
DSD_EVERY_WORLD_SIZE=0 ./bazel-bin/pigeon_conformance_test > "$TEST_TMPDIR/out" || {
  tail -n 100 "$TEST_TMPDIR/out"
  exit 1
}
tail -n 1 "$TEST_TMPDIR/out"

# What the embedder declared before the call is what is used.
"$bazel" "${startup[@]}" query "${workspace_mode[@]}" --noshow_progress //external:xxhash --output=build \
  2> /dev/null | tee "$TEST_TMPDIR/out"
grep -q 'path = "own_xxhash"' "$TEST_TMPDIR/out"

# All that a program with LibTorch needs is there; embedding_torch_test builds it.
"$bazel" "${startup[@]}" "${build[@]}" --nobuild //:embedded_torch
echo "embedding works"
