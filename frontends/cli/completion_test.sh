#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The completion for bash, in a bash; those for zsh and fish in these, where
# they are installed.
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
for verb in $("$dsd" completion bash | sed -n 's/.*compgen -W "\(.*\) --help --version".*/\1/p'); do
  [[ $(complete_words dsd "$verb" --he) == --help ]] || fail "$verb has no --help"
  "$dsd" completion zsh | grep -q "^    '$verb:" || fail "zsh lacks $verb"
  "$dsd" completion fish | grep -q -- " -a $verb -d " || fail "fish lacks $verb"
done

# What zsh offers at a terminal for the last word of a line.
cat >init.zsh <<'EOF'
PS1= PS2=
unset zle_bracketed_paste
autoload -Uz compinit && compinit -u -D
source <(dsd completion zsh)
compadd() {
  if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then builtin compadd "$@"; return; fi
  local -a hits
  builtin compadd -A hits "$@"
  print -rl -- $hits >>offered
  builtin compadd "$@"
}
zle -C list-them list-choices _main_complete
offer() { zle list-them; print OFFERED; BUFFER=; }
zle -N offer
bindkey '^T' offer
print READY
EOF
cat >offer.zsh <<'EOF'
zmodload zsh/zpty
: >offered
zpty session zsh -f -i
zpty -w session 'source ./init.zsh'
zpty -r session seen '*READY*'
zpty -w -n session "$1"$'\x14'
zpty -r session seen '*OFFERED*'
zpty -d session
sort -u offered
EOF
offer_zsh() { timeout 100 zsh -f offer.zsh "$1"; }
offer_fish() { timeout 100 fish --no-config -c "dsd completion fish | source; complete -C '$1'" | cut -f 1 | sort -u; }

offers() { # <shell> <what is expected, sorted, in one line> <line>
  local found
  found=$("offer_$1" "$3" | paste -sd ' ')
  [[ $found == "$2" ]] || fail "$1, for '$3': '$found', expected '$2'"
}
export HOME=$TEST_TMPDIR
for shell in zsh fish; do
  if ! command -v "$shell" >/dev/null; then
    echo "skipped: $shell is not installed"
    continue
  fi
  offers "$shell" 'plan plot' 'dsd pl'
  offers "$shell" '--keys' 'dsd ls --k'
  offers "$shell" '--rtol' 'dsd diff a b --rt'
  offers "$shell" 'bash fish zsh' 'dsd completion '
  offers "$shell" 'model.bias model.weight' "dsd cat $checkpoint m"
  offers "$shell" 'model.weight' "dsd cat --match x --full $checkpoint model.bias model.w"
done
[[ ! -e broken ]] || fail "a key was executed"
if "$dsd" completion tcsh 2>/dev/null; then fail "tcsh"; fi
echo "passed"
