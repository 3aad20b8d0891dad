#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The completion for bash, in a bash.
set -euo pipefail
dsd=$PWD/$1
"$2" "$TEST_TMPDIR"
cd "$TEST_TMPDIR"
checkpoint=names
PATH=$(dirname "$dsd"):$PATH

source <("$dsd" completion bash)

# complete <word>...: what is offered for the last word.
complete_words() {
  COMP_WORDS=("$@")
  COMP_CWORD=$(($# - 1))
  COMPREPLY=()
  _dsd
  printf '%s\n' "${COMPREPLY[@]}"
}

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

expect() { # <what is expected, sorted, in one line> <word>...
  local expected=$1 found
  shift
  found=$(complete_words "$@" | sort | paste -sd ' ')
  [[ $found == "$expected" ]] || fail "for '$*': '$found', expected '$expected'"
}

expect 'ls' dsd l
expect 'plan plot' dsd pl
expect '--keys' dsd ls --k
expect '--rtol' dsd diff a b --rt
expect 'bash' dsd completion b
mkdir -p folder/inner
touch folder/file
expect 'folder/file folder/inner' dsd ls folder/
expect 'folder/file folder/inner' dsd plot x --output folder/
expect '' dsd plan x --to 4 --from ''
expect 'model.bias model.weight' dsd cat "$checkpoint" m
expect 'model.bias' dsd cat "$checkpoint" model.b
expect 'model.weight' dsd cat --full "$checkpoint" model.bias model.w

# A key is text, whatever it has in it.
expect '\$\(touch\ broken\)' dsd cat "$checkpoint" '$'
[[ ! -e broken ]] || fail "a key was executed"

# Every command has its options, and the other shells have all commands.
for verb in $("$dsd" completion bash | sed -n 's/.*compgen -W "\(.*\) --help".*/\1/p'); do
  [[ $(complete_words dsd "$verb" --he) == --help ]] || fail "$verb has no --help"
  "$dsd" completion zsh | grep -q "^    '$verb:" || fail "zsh lacks $verb"
  "$dsd" completion fish | grep -q -- " -a $verb -d " || fail "fish lacks $verb"
done
if command -v zsh >/dev/null; then "$dsd" completion zsh | zsh -n; fi
if command -v fish >/dev/null; then "$dsd" completion fish | fish -n; fi
if "$dsd" completion tcsh 2>/dev/null; then fail "tcsh"; fi
echo "passed"
