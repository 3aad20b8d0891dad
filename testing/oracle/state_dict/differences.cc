// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/oracle/state_dict/differences.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/log/check.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "dsd/testing/oracle/state_dict/job.h"

namespace dsd::oracle {
namespace {

constexpr Difference kDifferences[] = {
    {"inert-state", "164929",
     "State that does not exist yet is step 0 and zeros; Python takes a step "
     "to make it, which counts and picks up weight decay."},
    {"no-buffer-before-the-first-step", "164929",
     "SGD has no momentum buffer before its first step; Python makes one, and "
     "misses one that is not in the dict."},
    {"partial-state", "192202",
     "A parameter without state gets an inert one also where others have "
     "theirs."},
    {"hyperparameter-order", "",
     "Groups have their keys in the order of the class; Python puts those "
     "first that were given for the group."},
    {"frozen-second-names", "",
     "ignore_frozen_params leaves out all names of a tied tensor; Python the "
     "first one only."},
    {"missing-keys-of-full-dicts", "126285",
     "Keys missing in a full dict are found and reported; Python fills in the "
     "live value and says nothing."},
    {"one-report-for-all-ranks", "",
     "With broadcast_from_rank0 all ranks report or refuse unexpected keys; "
     "Python only rank 0."},
    {"any-name-of-a-tied-tensor", "128011",
     "One name of a tied tensor is enough; Python wants all."},
    {"frozen-state", "192202",
     "Saved state of a frozen parameter is loaded; Python drops it."},
    {"state-type", "43706",
     "Loaded state keeps the type it was saved with; Python casts it to the "
     "parameter's."},
    {"tuples", "",
     "Tuples stay tuples; Python makes lists of them in the full path."},
    {"missing-state-of-flat-dicts", "192224",
     "State missing in a flat dict is an error if strict, and left alone if "
     "not; Python loads without a word or fails with another error."},
    {"live-state-stays", "",
     "State missing in the dict stays as it is if not strict; Python removes "
     "it, or makes it."},
    {"stateless-by-name", "192225",
     "Groups of an optimizer without state are matched by FQN; Python takes "
     "such a nested dict for one with numbers, by position."},
    {"stateless-in-full", "133415",
     "An optimizer without state can be set from a full dict; Python asserts."},
    {"flat-flag-in-full", "",
     "flatten_optimizer_state_dict does not disturb a full set; in Python it "
     "raises KeyError."},
    {"uneven-strided-shards-in-full", "130760",
     "Uneven strided shards are filled from full dicts; Python asserts if "
     "every rank has the dict."},
    {"offload-with-unexpected-key", "149516",
     "cpu_offload and a key that the model lacks go together; in Python that "
     "is a KeyError in the broadcast."},
    {"other-strides-in-broadcast", "",
     "Tensors that are not contiguous arrive as they are; Python sends their "
     "bytes as they lie."},
    {"module-registered-twice", "",
     "A sharded module registered twice can be set from a full dict; Python "
     "leaves its second path full and fails."},
};

bool Raised(const Lines& lines) {
  return !lines.empty() && absl::StartsWith(lines[0], "raised");
}

// "key text".
std::pair<std::string, std::string> CutKey(const std::string& line) {
  const size_t space = line.find(' ');
  CHECK_NE(space, std::string::npos) << line;
  return {line.substr(0, space), line.substr(space + 1)};
}

std::string StepText(double step, int rank) {
  return ConstantText("tensor float32 []", rank, step);
}

// "float32" of "tensor float32 [3] ...".
std::string TypeIn(const std::string& text) {
  const size_t begin = text.find(' ') + 1;
  return text.substr(begin, text.find(' ', begin) - begin);
}

std::string ListText(const char* what, std::vector<std::string> keys) {
  absl::c_sort(keys);
  return absl::StrCat(
      what, " [",
      absl::StrJoin(keys, ", ",
                    [](std::string* out, const std::string& key) {
                      absl::StrAppend(out, "'", key, "'");
                    }),
      "]");
}

// What a configuration is about, without asking Python.
class Scene {
 public:
  Scene(const GoldenFile& file, const Configuration& c, int rank,
        Occurrences& occurrences)
      : c_(c),
        rank_(rank),
        occurrences_(occurrences),
        keys_(KeysOf(file, c, "A")),
        live_keys_(KeysOf(file, c, "B")) {
    if (!c.Is("optimizer", "none")) {
      spec_ = &file.optimizers.at(c.of("optimizer"));
    }
    for (const KeyInfo& key : keys_) {
      if (key.is_parameter && key.name == key.canonical) {
        parameters_.push_back(key.name);
      }
    }
    const size_t half = (parameters_.size() + 1) / 2;
    owned_ = parameters_;
    if (c.Is("groups", "subset")) owned_.resize(half);
    if (c.Is("groups", "reversed")) absl::c_reverse(owned_);
  }

  void Note(absl::string_view name) {
    CHECK(absl::c_any_of(kDifferences, [&](const Difference& d) {
      return d.name == name;
    })) << name;
    occurrences_[std::string(name)].insert(c_.number);
  }
  void NoteIf(bool changed, absl::string_view name) {
    if (changed) Note(name);
  }

  const std::string& first() const { return parameters_.front(); }
  const std::string& last() const { return parameters_.back(); }
  bool is_adagrad() const { return spec_->kind == "Adagrad"; }
  bool is_sgd() const { return spec_ != nullptr && spec_->kind == "SGD"; }
  // Python does not see the second path of a module that is registered twice.
  bool IsSharedInFull() const {
    return c_.Is("model", "shared") && !c_.Is("placement", "plain") &&
           !c_.Is("set_from", "shards");
  }
  bool frozen_left_out() const {
    return c_.Has("ignore_frozen") && !c_.Is("frozen", "no");
  }

  const KeyInfo& KeyOf(const std::string& name, bool live = false) const {
    const auto& keys = live ? live_keys_ : keys_;
    const auto it =
        absl::c_find_if(keys, [&](const KeyInfo& k) { return k.name == name; });
    CHECK(it != keys.end()) << name;
    return *it;
  }
  bool IsFirst(const std::string& name) const {
    return absl::c_any_of(keys_, [&](const KeyInfo& k) {
      return k.name == name && k.canonical == first();
    });
  }

  // The state of a parameter that A or B has: entry and text. Empty: none.
  Lines StateOf(const std::string& name, const std::string& side,
                const std::string& state) const {
    const bool none =
        state == "untouched" || (name == first() && c_.Is("frozen", "fresh"));
    Lines lines;
    if (none && !is_adagrad()) return lines;
    const std::string& like = KeyOf(name, side == "B").like;
    for (const std::string& entry : spec_->entries) {
      std::string text;
      if (none) {
        text = entry == "step" ? StepText(0, rank_)
                               : ConstantText(like, rank_, InitialSum(side));
      } else {
        text = entry == "step"
                   ? StepText(side == "A" ? 3 : 5, rank_)
                   : PatternText(like, rank_,
                                 absl::StrCat(side, "/", name, "/", entry));
      }
      lines.push_back(absl::StrCat(entry, " ", text));
    }
    return lines;
  }

  // The parameter whose state the edit removes; empty: none.
  std::string DroppedState() const {
    if (spec_ == nullptr || !c_.Is("edit", "drop_state")) return "";
    std::string last;
    for (const std::string& name : owned_) {
      if (!StateOf(name, "A", "stepped").empty()) {
        last = std::max(last, absl::StrCat(name, "."));
      }
    }
    return std::string(absl::StripSuffix(last, "."));
  }

  // Canonical names of tensors of which the dict has no name.
  std::vector<std::string> MissingKeys() const {
    std::vector<std::string> missing;
    for (const KeyInfo& key : keys_) {
      if (key.name != key.canonical) continue;
      if (absl::c_none_of(keys_, [&](const KeyInfo& k) {
            return k.canonical == key.name && !IsLeftOut(k.name);
          })) {
        missing.push_back(key.name);
      }
    }
    return missing;
  }
  bool HasUnexpectedKey() const {
    return c_.Is("edit", "extra") || c_.Is("edit", "drop_and_extra");
  }

  bool ModelIsRefused() const {
    return c_.Is("edit", "shape") ||
           (c_.Has("set_strict") &&
            (HasUnexpectedKey() || !MissingKeys().empty()));
  }
  bool OptimizersAreRefused() const {
    const std::string dropped = DroppedState();
    return c_.Has("set_strict") && !dropped.empty() && !is_sgd() &&
           (dropped != first() || c_.Is("frozen", "no"));
  }

  // Names of the first parameter's tensor, if it is frozen and left out.
  bool IsFrozenAndLeftOut(const std::string& name) const {
    return frozen_left_out() && IsFirst(name);
  }
  const std::vector<std::string>& entries() const { return spec_->entries; }
  const std::vector<std::string>& owned() const { return owned_; }
  bool has_optimizers() const { return spec_ != nullptr; }
  int rank() const { return rank_; }
  const Configuration& configuration() const { return c_; }

 private:
  double InitialSum(const std::string& side) const {
    for (const auto& [name, value] : spec_->hyperparameters.at(side)) {
      double number = 0;
      if (name == "initial_accumulator_value") {
        CHECK(absl::SimpleAtod(value, &number));
        return number;
      }
    }
    return 0;
  }

  bool IsLeftOut(const std::string& name) const {
    const bool dropped =
        c_.Is("edit", "drop") || c_.Is("edit", "drop_and_extra");
    return (dropped && name == keys_[1].name) ||
           (frozen_left_out() && IsFirst(name));
  }

  const Configuration& c_;
  const int rank_;
  Occurrences& occurrences_;
  const std::vector<KeyInfo> keys_;
  const std::vector<KeyInfo> live_keys_;
  const OptimizerSpec* spec_ = nullptr;
  std::vector<std::string> parameters_;  // canonical, in order
  std::vector<std::string> owned_;       // by A's optimizers, in their order
};

// Get.

// "state/<FQN>/<entry>" and "param_groups/<number>/<name>", or the flat form
// "state.<FQN>.<entry>" and "param_groups.<FQN>.<name>".
struct GotLine {
  bool is_state = false;
  std::string owner;  // FQN or number of a group
  std::string name;
  std::string text;
};

class GotOptimizers {
 public:
  GotOptimizers(const Lines& lines, bool flat) : separator_(flat ? '.' : '/') {
    for (size_t i = 1; i < lines.size(); ++i) {
      if (lines[i] == "state {}") continue;
      auto [key, text] = CutKey(lines[i]);
      GotLine line;
      absl::string_view rest = key;
      line.is_state =
          absl::ConsumePrefix(&rest, absl::StrCat("state", Separator()));
      if (!line.is_state) {
        CHECK(absl::ConsumePrefix(&rest,
                                  absl::StrCat("param_groups", Separator())));
      }
      const size_t cut = rest.rfind(separator_);
      line.owner = std::string(rest.substr(0, cut));
      line.name = std::string(rest.substr(cut + 1));
      line.text = std::move(text);
      this->lines.push_back(std::move(line));
    }
  }

  Lines ToLines() const {
    Lines out = {"ok"};
    if (separator_ == '/' &&
        absl::c_none_of(lines, [](const GotLine& l) { return l.is_state; })) {
      out.push_back("state {}");
    }
    for (const GotLine& line : lines) {
      out.push_back(absl::StrCat(line.is_state ? "state" : "param_groups",
                                 Separator(), line.owner, Separator(),
                                 line.name, " ", line.text));
    }
    return out;
  }

  std::vector<GotLine> lines;

 private:
  std::string Separator() const { return std::string(1, separator_); }

  const char separator_;
};

// Every group's names in the order of the class, in which "lr" is first.
template <class Line>
bool OrderNames(std::vector<Line>& lines,
                const std::vector<std::string>& order) {
  bool changed = false;
  const auto place = [&](const Line& line) {
    return absl::c_find(order, line.name) - order.begin();
  };
  for (auto begin = lines.begin(); begin != lines.end();) {
    auto end = std::find_if(begin, lines.end(), [&](const Line& line) {
      return line.owner != begin->owner;
    });
    const auto less = [&](const Line& a, const Line& b) {
      return place(a) < place(b);
    };
    changed = changed || !std::is_sorted(begin, end, less);
    std::stable_sort(begin, end, less);
    begin = end;
  }
  return changed;
}

// The names of the first group that has "lr" first.
template <class Line>
std::vector<std::string> ClassOrder(const std::vector<Line>& lines) {
  std::vector<std::string> order;
  for (auto line = lines.begin(); line != lines.end(); ++line) {
    const bool starts = line == lines.begin() || line[-1].owner != line->owner;
    if (starts && !order.empty()) break;
    if (!order.empty() || (starts && line->name == "lr")) {
      order.push_back(line->name);
    }
  }
  return order;
}

Lines IntendedModel(const Lines& python, Scene& scene) {
  if (Raised(python)) return {"raised"};
  Lines lines;
  for (const std::string& line : python) {
    if (line != "ok" && scene.IsFrozenAndLeftOut(CutKey(line).first)) {
      scene.Note("frozen-second-names");
    } else {
      lines.push_back(line);
    }
  }
  return lines;
}

// What a parameter that never was stepped has; `like` is the parameter's text.
std::vector<GotLine> InertLines(const std::string& name,
                                const std::string& like, const Scene& scene) {
  std::vector<GotLine> lines;
  if (scene.is_sgd()) return lines;
  for (const std::string& entry : scene.entries()) {
    lines.push_back({true, name, entry,
                     entry == "step" ? StepText(0, scene.rank())
                                     : ConstantText(like, scene.rank(), 0)});
  }
  return lines;
}

Lines IntendedState(const Lines& python, Scene& scene) {
  if (Raised(python)) return {"raised"};
  if (python.size() == 1) return python;
  const Configuration& c = scene.configuration();
  GotOptimizers got(python, c.Has("get_flat"));
  if (!c.Is("state", "stepped") && !scene.is_adagrad()) {
    const bool all = c.Is("state", "untouched");
    std::vector<GotLine> lines;
    bool has_last = false;
    for (GotLine& line : got.lines) {
      const bool inert = line.is_state && (all || line.owner == scene.last());
      has_last = has_last || (line.is_state && line.owner == scene.last());
      if (inert && scene.is_sgd()) {
        scene.Note("no-buffer-before-the-first-step");
        continue;
      }
      if (inert) {
        std::string text = line.name == "step"
                               ? StepText(0, scene.rank())
                               : ConstantText(line.text, scene.rank(), 0);
        scene.NoteIf(text != line.text, "inert-state");
        line.text = std::move(text);
      }
      lines.push_back(std::move(line));
    }
    const bool is_owned = absl::c_linear_search(scene.owned(), scene.last());
    if (!all && !has_last && is_owned) {
      std::string like = scene.KeyOf(scene.last()).like;
      if (c.Has("get_full")) {
        like = absl::StrReplaceAll(like, {{"distributed ", "tensor "}});
      }
      const std::vector<GotLine> inert = InertLines(scene.last(), like, scene);
      scene.NoteIf(!inert.empty(), "partial-state");
      const auto where = scene.owned().front() == scene.last()
                             ? lines.begin()
                             : absl::c_find_if(lines, [](const GotLine& l) {
                                 return !l.is_state;
                               });
      lines.insert(where, inert.begin(), inert.end());
    }
    got.lines = std::move(lines);
  }
  const auto groups = absl::c_find_if(
      got.lines, [](const GotLine& line) { return !line.is_state; });
  std::vector<GotLine> group_lines(groups, got.lines.end());
  scene.NoteIf(OrderNames(group_lines, ClassOrder(group_lines)),
               "hyperparameter-order");
  std::copy(group_lines.begin(), group_lines.end(), groups);
  return got.ToLines();
}

// Set.

// "optimizer 0 group 0/lr ...", "optimizer 0 state fc.weight/step ...".
struct LiveLine {
  bool is_state = false;
  std::string owner;  // all before the last "/"
  std::string name;
  std::string text;

  std::string ToString() const {
    return absl::StrCat(owner, "/", name, " ", text);
  }
};

LiveLine ParseLive(const std::string& line) {
  // Neither owners nor names have a "/" in them.
  const size_t slash = line.find('/');
  CHECK_NE(slash, std::string::npos) << line;
  auto [name, text] = CutKey(line.substr(slash + 1));
  LiveLine out;
  out.owner = line.substr(0, slash);
  out.is_state = absl::StrContains(out.owner, " state ");
  out.name = std::move(name);
  out.text = std::move(text);
  return out;
}

// One group of a live optimizer.
struct LiveGroup {
  std::string owner;  // "optimizer 0 group 0"
  std::vector<LiveLine> hyperparameters;
  std::vector<std::string> params;
  std::map<std::string, std::vector<LiveLine>> state;  // by FQN
};

std::vector<LiveGroup> ParseGroups(const Lines& lines) {
  std::vector<LiveGroup> groups;
  for (size_t i = 1; i < lines.size(); ++i) {
    LiveLine line = ParseLive(lines[i]);
    if (!line.is_state) {
      if (groups.empty() || groups.back().owner != line.owner) {
        groups.push_back({line.owner, {}, {}, {}});
      }
      if (line.name == "params") {
        absl::string_view list = line.text;
        list = list.substr(1, list.size() - 2);
        for (absl::string_view item : absl::StrSplit(list, ", ")) {
          groups.back().params.emplace_back(absl::StripPrefix(item, "str "));
        }
      }
      groups.back().hyperparameters.push_back(std::move(line));
    } else {
      const std::string name = line.owner.substr(line.owner.rfind(' ') + 1);
      groups.back().state[name].push_back(std::move(line));
    }
  }
  return groups;
}

Lines IntendedLive(const Lines& python, Scene& scene) {
  const Configuration& c = scene.configuration();
  if (!scene.has_optimizers()) return python;
  std::vector<LiveGroup> groups = ParseGroups(python);
  std::vector<LiveLine> hyperparameters;
  for (const LiveGroup& group : groups) {
    for (LiveLine line : group.hyperparameters) {
      if (absl::StartsWith(line.text, "[float")) {
        scene.Note("tuples");
        line.text = absl::StrReplaceAll(line.text, {{"[", "("}, {"]", ")"}});
      }
      hyperparameters.push_back(std::move(line));
    }
  }
  scene.NoteIf(OrderNames(hyperparameters, ClassOrder(hyperparameters)),
               "hyperparameter-order");

  const std::string dropped = scene.DroppedState();
  Lines lines = {"ok"};
  for (const LiveGroup& group : groups) {
    for (const LiveLine& line : hyperparameters) {
      if (line.owner == group.owner) lines.push_back(line.ToString());
    }
    const std::string prefix = absl::StrCat(
        group.owner.substr(0, group.owner.find(" group")), " state ");
    for (const std::string& param : group.params) {
      Lines had;
      std::string type;
      if (const auto state = group.state.find(param);
          state != group.state.end()) {
        for (const LiveLine& line : state->second) {
          had.push_back(absl::StrCat(line.name, " ", line.text));
          if (line.name != "step") type = TypeIn(line.text);
        }
      }
      const Lines saved = scene.StateOf(param, "A", "stepped");
      const bool is_saved = !saved.empty() && param != dropped;
      Lines meant = saved;
      if (!is_saved) meant = scene.StateOf(param, "B", c.of("live"));
      if (param == dropped && scene.is_sgd()) meant.clear();
      // Where nothing of the table applies, Python is right.
      Lines& use = had;
      if (had != meant) {
        const std::string saved_type =
            is_saved ? TypeIn(scene.KeyOf(param).like) : type;
        absl::string_view why;
        if (param == dropped) {
          why = scene.is_sgd() ? "no-buffer-before-the-first-step"
                               : "live-state-stays";
        } else if (param == scene.first() && !c.Is("frozen", "no")) {
          why = "frozen-state";
        } else if (!type.empty() && type != saved_type) {
          why = "state-type";
        } else if (c.Is("set_from", "broadcast") &&
                   (absl::StrContains(scene.KeyOf(param).like, "S(1)") ||
                    absl::StrContains(scene.KeyOf(param).like, "S(2)"))) {
          why = "other-strides-in-broadcast";
        }
        if (!why.empty()) {
          scene.Note(why);
          use = meant;
        }
      }
      for (const std::string& line : use) {
        lines.push_back(absl::StrCat(prefix, param, "/", line));
      }
    }
  }
  return lines;
}

// Which row says that Python fails where dsd does not; empty: none.
absl::string_view KnownFailure(const std::string& text, const Scene& scene) {
  const Configuration& c = scene.configuration();
  const bool full = !c.Is("set_from", "shards");
  if (full && c.Is("set_form", "flat_flag") &&
      (absl::StrContains(text, "KeyError: 'param_groups") ||
       absl::StrContains(text, "KeyError: 'state'"))) {
    return "flat-flag-in-full";
  }
  if (full && absl::StrContains(text, "Expected device to be set")) {
    return "stateless-in-full";
  }
  if (c.Is("set_from", "full") && c.Is("placement", "fsdp_tp") &&
      text == "raised AssertionError: ") {
    return "uneven-strided-shards-in-full";
  }
  if (c.Has("set_offload") && scene.HasUnexpectedKey() &&
      absl::StrContains(text, "KeyError: 'gone.weight'")) {
    return "offload-with-unexpected-key";
  }
  if ((scene.IsSharedInFull() &&
       absl::StrContains(text, "While copying the parameter named")) ||
      (full && c.Is("model", "shared") &&
       absl::StrContains(text, "KeyError: 'last."))) {
    return "module-registered-twice";
  }
  if (scene.is_sgd() && c.Is("edit", "drop_state") &&
      absl::StrContains(text, "Missing optimizer state for parameter")) {
    return "no-buffer-before-the-first-step";
  }
  if (scene.MissingKeys().empty() &&
      absl::StrContains(text, "Missing key(s) in state_dict")) {
    return "any-name-of-a-tied-tensor";
  }
  if (c.Is("optimizer", "sgd") &&
      (absl::StrContains(text, "Missing optimizer state") ||
       absl::StrContains(text, "different number of parameter groups") ||
       absl::StrContains(text, "doesn't match the size"))) {
    return "stateless-by-name";
  }
  if (c.Is("edit", "drop_state") && !c.Is("set_form", "nested") &&
      absl::StrContains(text, "TypeError")) {
    return "missing-state-of-flat-dicts";
  }
  return "";
}

// The result that is compared: Python's own, or if that is a known failure what
// Python gives by the way that works.
const Lines& Base(const Configuration& c, Lines Outcome::*part, Scene& scene) {
  const Lines& own = c.set[scene.rank()].*part;
  if (c.path.empty()) return own;
  const Lines& path = c.path[scene.rank()].*part;
  if (Raised(own)) {
    const absl::string_view why = KnownFailure(own[0], scene);
    if (why.empty()) return own;
    scene.Note(why);
    return path;
  }
  if (scene.IsSharedInFull() && part == &Outcome::model && !Raised(path) &&
      path != own) {
    scene.Note("module-registered-twice");
    return path;
  }
  if (c.Is("optimizer", "sgd") && c.Is("set_form", "nested") &&
      part == &Outcome::optimizers && !Raised(path) && path != own) {
    scene.Note("stateless-by-name");
    return path;
  }
  return own;
}

}  // namespace

absl::Span<const Difference> AllDifferences() { return kDifferences; }

Outcome IntendedGet(const GoldenFile& file, const Configuration& c, int rank,
                    Occurrences& occurrences) {
  Scene scene(file, c, rank, occurrences);
  return {IntendedModel(c.get[rank].model, scene),
          IntendedState(c.get[rank].optimizers, scene)};
}

Outcome IntendedSet(const GoldenFile& file, const Configuration& c, int rank,
                    Occurrences& occurrences) {
  Scene scene(file, c, rank, occurrences);
  const bool both = c.Is("api", "both");
  const bool refuses_model = scene.ModelIsRefused();
  const bool refuses_optimizers = scene.OptimizersAreRefused();
  const Outcome& python = c.set[rank];
  Outcome meant = {{"raised"}, {"raised"}};

  if (refuses_model && !Raised(python.model)) {
    scene.Note(scene.MissingKeys().empty() ? "one-report-for-all-ranks"
                                           : "missing-keys-of-full-dicts");
  } else if (refuses_optimizers && !Raised(python.optimizers)) {
    scene.Note("missing-state-of-flat-dicts");
  }
  if (!refuses_model && !(both && refuses_optimizers)) {
    meant.model = Base(c, &Outcome::model, scene);
    if (!Raised(meant.model)) {
      const std::string missing = ListText("missing", scene.MissingKeys());
      if (meant.model[1] != missing) {
        // Python names every name that it lacks, or none at all.
        scene.Note(meant.model[1] == "missing []"
                       ? "missing-keys-of-full-dicts"
                       : "any-name-of-a-tied-tensor");
        meant.model[1] = missing;
      }
      std::vector<std::string> unexpected;
      if (scene.HasUnexpectedKey()) unexpected = {"gone.weight"};
      const std::string text = ListText("unexpected", unexpected);
      scene.NoteIf(meant.model[2] != text, "one-report-for-all-ranks");
      meant.model[2] = text;
      for (size_t i = 3; i < meant.model.size(); ++i) {
        const auto [name, value] = CutKey(meant.model[i]);
        if (!scene.IsFrozenAndLeftOut(name)) continue;
        std::string live = absl::StrCat(
            name, " ", PatternText(value, rank, "B/" + scene.first()));
        scene.NoteIf(live != meant.model[i], "frozen-second-names");
        meant.model[i] = std::move(live);
      }
    }
  }
  if (!refuses_optimizers && !(both && refuses_model)) {
    meant.optimizers = Base(c, &Outcome::optimizers, scene);
    if (!Raised(meant.optimizers)) {
      meant.optimizers = IntendedLive(meant.optimizers, scene);
    }
  }
  return meant;
}

}  // namespace dsd::oracle
