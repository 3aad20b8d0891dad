// SPDX-License-Identifier: Apache-2.0

#include <memory>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

constexpr char kNotes[] =
    "To use it at once:  source <(dsd completion bash)\n"
    "For all new shells: dsd completion bash > "
    "~/.local/share/bash-completion/completions/dsd\n"
    "                    dsd completion zsh > a folder of $fpath, as _dsd\n"
    "                    dsd completion fish > "
    "~/.config/fish/completions/dsd.fish";

struct OptionWords {
  std::vector<std::string> names;  // "-o", "--output"
  std::string description;
  bool has_value = false;
};

struct VerbWords {
  std::string name;
  std::string summary;
  std::vector<OptionWords> options;
};

// What the arguments' own declarations say.
std::vector<VerbWords> AllWords(const CLI::App& root) {
  std::vector<VerbWords> out;
  for (const CLI::App* app : root.get_subcommands(nullptr)) {
    VerbWords verb{app->get_name(), app->get_description(), {}};
    for (const CLI::Option* option : app->get_options()) {
      if (!option->nonpositional()) continue;
      OptionWords words;
      for (const std::string& name : option->get_snames()) {
        words.names.push_back(absl::StrCat("-", name));
      }
      for (const std::string& name : option->get_lnames()) {
        words.names.push_back(absl::StrCat("--", name));
      }
      words.description = option->get_description();
      words.has_value = option->get_items_expected_max() > 0;
      verb.options.push_back(std::move(words));
    }
    out.push_back(std::move(verb));
  }
  return out;
}

std::string Names(const std::vector<VerbWords>& verbs) {
  return absl::StrJoin(verbs, " ", [](std::string* out, const VerbWords& verb) {
    absl::StrAppend(out, verb.name);
  });
}

// Keys are read line by line: a word list would be expanded by the shell, and
// keys are not to be trusted.
std::string Bash(const std::vector<VerbWords>& verbs) {
  std::string options, values;
  for (const VerbWords& verb : verbs) {
    std::vector<std::string> all, with_value;
    for (const OptionWords& option : verb.options) {
      all.insert(all.end(), option.names.begin(), option.names.end());
      if (!option.has_value) continue;
      with_value.insert(with_value.end(), option.names.begin(),
                        option.names.end());
    }
    absl::StrAppend(&options, "    ", verb.name, ") options=\"",
                    absl::StrJoin(all, " "), "\" valued=\" ",
                    absl::StrJoin(with_value, " "), " \" ;;\n");
  }
  return absl::StrReplaceAll(
      R"bash(# Completion of dsd for bash.
_dsd() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
  local verb= options= valued= word skip= i
  local -a operands=()
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; ++i)); do
    word=${COMP_WORDS[i]}
    if [[ -n $skip ]]; then skip=; continue; fi
    if [[ -z $verb && $word != -* ]]; then
      verb=$word
      case $verb in
@OPTIONS@      esac
    elif [[ $word == -?* ]]; then
      [[ $valued == *" $word "* ]] && skip=1
    elif [[ -n $verb ]]; then
      operands+=("$word")
    fi
  done
  if [[ -z $verb ]]; then
    COMPREPLY=($(compgen -W "@VERBS@ --help --version" -- "$cur"))
  elif [[ -n $skip ]]; then
    [[ $prev == -o || $prev == --output ]] || return 0
    compopt -o filenames 2>/dev/null
    COMPREPLY=($(compgen -f -- "$cur"))
  elif [[ $cur == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$cur"))
  elif [[ $verb == completion ]]; then
    COMPREPLY=($(compgen -W "bash zsh fish" -- "$cur"))
  elif [[ $verb == cat && ${#operands[@]} -gt 0 ]]; then
    while IFS= read -r word; do
      [[ $word == "$cur"* ]] && COMPREPLY+=("$(printf %q "$word")")
    done < <("${COMP_WORDS[0]}" ls --keys -- "${operands[0]/#\~/${HOME-}}" 2>/dev/null)
  else
    compopt -o filenames 2>/dev/null
    local IFS=$'\n'
    COMPREPLY=($(compgen -f -- "$cur"))
  fi
}
complete -F _dsd dsd
)bash",
      {{"@OPTIONS@", absl::StrReplaceAll(options, {{"    ", "        "}})},
       {"@VERBS@", Names(verbs)}});
}

// For text in single quotes, within brackets of zsh's _arguments.
std::string ZshText(absl::string_view text) {
  return absl::StrReplaceAll(
      text, {{"'", "'\\''"}, {"[", "\\["}, {"]", "\\]"}, {":", "\\:"}});
}

std::string Zsh(const std::vector<VerbWords>& verbs) {
  std::string summaries, cases;
  for (const VerbWords& verb : verbs) {
    absl::StrAppend(&summaries, "    '", verb.name, ":", ZshText(verb.summary),
                    "'\n");
    absl::StrAppend(&cases, "    ", verb.name, ")\n      _arguments \\\n");
    for (const OptionWords& option : verb.options) {
      for (const std::string& name : option.names) {
        const bool is_file = name == "-o" || name == "--output";
        absl::StrAppend(&cases, "        '", name, "[",
                        ZshText(option.description), "]",
                        !option.has_value ? ""
                        : is_file         ? ":file:_files"
                                          : ":value:",
                        "' \\\n");
      }
    }
    absl::StrAppend(&cases, "        ",
                    verb.name == "completion" ? "'1:shell:(bash zsh fish)'"
                    : verb.name == "cat"
                        ? "'1:checkpoint:_files' '*:key:_dsd_keys'"
                        : "'*:checkpoint:_files'",
                    " ;;\n");
  }
  return absl::StrReplaceAll(
      R"zsh(#compdef dsd
# Completion of dsd for zsh.
_dsd_keys() {
  local -a keys
  keys=(${(f)"$(dsd ls --keys -- ${(Q)~line[1]} 2>/dev/null)"})
  compadd -a keys
}
_dsd() {
  local -a verbs
  verbs=(
@SUMMARIES@  )
  if ((CURRENT == 2)); then
    _describe 'command' verbs
    return
  fi
  shift words
  ((CURRENT--))
  case $words[1] in
@CASES@  esac
}
if [[ $funcstack[1] == _dsd ]]; then _dsd; else compdef _dsd dsd; fi
)zsh",
      {{"@SUMMARIES@", summaries}, {"@CASES@", cases}});
}

std::string FishText(absl::string_view text) {
  return absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"'", "\\'"}});
}

std::string Fish(const std::vector<VerbWords>& verbs) {
  std::string out = R"fish(# Completion of dsd for fish.
function __dsd_keys # <options with a value>...: of the checkpoint that is named
  set -l operands
  set -l skip
  for word in (commandline -opc)
    if test -n "$skip"
      set skip
    else if contains -- $word $argv
      set skip yes
    else if not string match -q -- '-*' $word
      set -a operands $word
    end
  end
  set -q operands[3]; and dsd ls --keys -- $operands[3] 2>/dev/null
end
)fish";
  for (const VerbWords& verb : verbs) {
    absl::StrAppend(&out, "complete -c dsd -n __fish_use_subcommand -f -a ",
                    verb.name, " -d '", FishText(verb.summary), "'\n");
    const std::string when = absl::StrCat(
        "complete -c dsd -n '__fish_seen_subcommand_from ", verb.name, "'");
    for (const OptionWords& option : verb.options) {
      absl::StrAppend(&out, when);
      for (const std::string& name : option.names) {
        absl::StrAppend(&out, name[1] == '-' ? " -l " : " -s ",
                        name.substr(name[1] == '-' ? 2 : 1));
      }
      absl::StrAppend(&out, option.has_value ? " -r" : "", " -d '",
                      FishText(option.description), "'\n");
    }
    if (verb.name == "completion") {
      absl::StrAppend(&out, when, " -f -a 'bash zsh fish'\n");
    } else if (verb.name == "cat") {
      std::string valued;
      for (const OptionWords& option : verb.options) {
        if (!option.has_value) continue;
        absl::StrAppend(&valued, " ", absl::StrJoin(option.names, " "));
      }
      absl::StrAppend(&out, when, " -a '(__dsd_keys", valued, ")'\n");
    }
  }
  return out;
}

}  // namespace

VerbBody DeclareCompletion(CLI::App& app) {
  auto shell = std::make_shared<std::string>();
  app.add_option("shell", *shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  app.footer(kNotes);
  return [shell, &app](Context& context) -> absl::StatusOr<ExitCode> {
    const std::vector<VerbWords> verbs = AllWords(*app.get_parent());
    context.out << (*shell == "bash"  ? Bash(verbs)
                    : *shell == "zsh" ? Zsh(verbs)
                                      : Fish(verbs));
    return kExitOk;
  };
}

}  // namespace dsd::cli
