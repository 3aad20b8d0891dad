#!/usr/bin/env bash
# Tests of bazelw, with stand-ins for bazel and apt-get. Argument: bazelw.
set -euo pipefail

tree=$TEST_TMPDIR/tree
fake=$TEST_TMPDIR/bin
mkdir -p "$tree/sub" "$fake"
bazelw=$tree/bazelw
cp "$1" "$bazelw"
cat >"$fake/bazel" <<'FAKE'
#!/bin/sh
if [ "$1" = --version ]; then
  echo "bazel ${FAKE_VERSION:-no_version}"
  exit 0
fi
if [ "$1" = where ]; then
  pwd
  exit 0
fi
for word in "$@"; do printf '<%s>' "$word"; done
echo
exit "${FAKE_STATUS:-0}"
FAKE
printf '#!/bin/sh\necho "no apt-get in a test" >&2\nexit 1\n' >"$fake/apt-get"
chmod +x "$fake/bazel" "$fake/apt-get"
export PATH=$fake:$PATH XDG_CACHE_HOME=/cache
unset CI DSD_BUILD_EVENTS DSD_DISK_CACHE HOME

failed=0
expect() { # <what> <wanted> <got>
  if [[ $2 != "$3" ]]; then
    echo "FAILED: $1"
    echo "  wanted: $2"
    echo "  got:    $3"
    failed=1
  fi
}
# The number of jobs depends on the machine's memory.
run() { "$@" 2>&1 | sed 's/<--jobs=[0-9]*>//'; }

cache='<--disk_cache=/cache/dsd/bazel-disk>'
expect "the cache is added" "<test>$cache<//...>" "$(run "$bazelw" test //...)"
expect "startup options stay in front" "<--output_user_root=/x><--output_base></y><build>$cache<--config=asan><//a b>" \
  "$(run "$bazelw" --output_user_root=/x --output_base /y build --config=asan '//a b')"
expect "a query takes no build options" '<query><//...>' "$(run "$bazelw" query //...)"
expect "no arguments" '' "$(run "$bazelw")"
expect "another cache" '<build><--disk_cache=/c><//a>' "$(DSD_DISK_CACHE=/c run "$bazelw" build //a)"
expect "no cache" '<build><//a>' "$(DSD_DISK_CACHE='' run "$bazelw" build //a)"
expect "the home's cache" '<build><--disk_cache=/home/.cache/dsd/bazel-disk><//a>' \
  "$(XDG_CACHE_HOME='' HOME=/home run "$bazelw" build //a)"
expect "no home" "bazelw: HOME is not set; set it, or DSD_DISK_CACHE to the folder of the disk cache (empty: none)" \
  "$(XDG_CACHE_HOME='' run "$bazelw" build //a)"
expect "no home, no cache" '<build><//a>' "$(XDG_CACHE_HOME='' DSD_DISK_CACHE='' run "$bazelw" build //a)"
expect "continuous integration" "<test>$cache<--config=ci><--build_event_json_file=/e><//a>" \
  "$(CI=true DSD_BUILD_EVENTS=/e run "$bazelw" test //a)"
expect "Bazel 7" "<test><--noenable_bzlmod>$cache<//a>" "$(FAKE_VERSION=7.4.1 run "$bazelw" test //a)"
expect "Bazel 8" '<query><--noenable_bzlmod><--enable_workspace><//a>' "$(FAKE_VERSION=8.0.0 run "$bazelw" query //a)"
expect "Bazel 9 is refused" 1 "$(FAKE_VERSION=9.0.0 "$bazelw" build //a >/dev/null 2>&1 || echo $?)"
expect "the exit status is Bazel's" 3 "$(FAKE_STATUS=3 "$bazelw" test //a >/dev/null 2>&1 || echo $?)"
expect "it runs from anywhere" "$tree" "$(cd / && run "$bazelw" where)"
expect "it stays in a folder of the repository" "$tree/sub" "$(cd "$tree/sub" && run "$bazelw" where)"
ln -s "$fake" "$tree/bazel-tree"
run "$bazelw" query //a >/dev/null
expect "the link to the output base is gone" "" "$(cd "$tree" && ls -d bazel-* 2>/dev/null)"
expect "its own help" "usage: ./bazelw" "$("$bazelw" --help | cut -c1-15 | head -n 1)"
expect "Bazel's help" '<help>' "$(run "$bazelw" help)"

# Something is missing (a compiler of a name that nothing has), and cannot be installed.
text=$(CXX=no-such-compiler "$bazelw" build //a 2>&1) && status=0 || status=$?
expect "it fails if something is missing" 1 "$status"
expect "it names the package" "bazelw: not installed: g++" "${text%%$'\n'*}"

exit $failed
