// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/compare.h"
#include "dsd/frontends/cli/element_stream.h"
#include "dsd/frontends/cli/progress.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::Checkpoint;
using checkpoint::CheckpointEndpoint;

constexpr char kNotes[] =
    "Tensors are compared as a whole, however they are cut into shards. "
    "Without --rtol and\n--atol they must be equal bit by bit; with one of "
    "them a and b are the same if\n|a - b| <= atol + rtol * |b|, and NaN "
    "equals NaN. The exit code is 0 if all is the\nsame, 1 if something "
    "differs, 3 if something could not be compared.";

struct Arguments {
  std::string a;
  std::string b;
  Tolerance tolerance;
  std::string match;
  std::string prefix_a;
  std::string prefix_b;
  bool ignore_dtype = false;
  bool quiet = false;
};

// What a checkpoint has under one name.
struct Thing {
  enum class Kind { kTensor, kObject, kUnreadable };
  Kind kind;
  size_t index;  // in catalog(), objects() or unreadable()
};

struct Side {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::unique_ptr<CheckpointEndpoint> endpoint;
  // By name without the prefix.
  std::map<std::string, Thing> things;

  static absl::StatusOr<Side> Open(const std::string& directory,
                                   absl::string_view prefix,
                                   absl::string_view match);
  const TensorSpec& spec(const Thing& thing) const {
    return checkpoint->catalog()[thing.index];
  }
  std::string Describe(const Thing& thing) const;
};

absl::StatusOr<Side> Side::Open(const std::string& directory,
                                absl::string_view prefix,
                                absl::string_view match) {
  Side side;
  DSD_ASSIGN_OR_RETURN(side.checkpoint, Checkpoint::Open(directory));
  DSD_ASSIGN_OR_RETURN(side.endpoint, side.checkpoint->MakeEndpoint());
  const Checkpoint& stored = *side.checkpoint;
  const auto add = [&](absl::string_view key, Thing::Kind kind, size_t index) {
    if (!absl::ConsumePrefix(&key, prefix)) return;
    if (!absl::StrContains(key, match)) return;
    side.things.emplace(key, Thing{kind, index});
  };
  for (size_t i = 0; i < stored.catalog().size(); ++i) {
    add(stored.catalog()[i].fqn, Thing::Kind::kTensor, i);
  }
  for (size_t i = 0; i < stored.objects().size(); ++i) {
    add(stored.objects()[i].key, Thing::Kind::kObject, i);
  }
  for (size_t i = 0; i < stored.unreadable().size(); ++i) {
    add(stored.unreadable()[i].first, Thing::Kind::kUnreadable, i);
  }
  return side;
}

std::string Side::Describe(const Thing& thing) const {
  switch (thing.kind) {
    case Thing::Kind::kTensor:
      return absl::StrCat(DTypeName(spec(thing).dtype), " ",
                          DimsToString(spec(thing).shape()));
    case Thing::Kind::kUnreadable:
      return absl::StrCat(
          Printable(checkpoint->unreadable()[thing.index].second), " tensor");
    case Thing::Kind::kObject:
      break;
  }
  return "an object";
}

// One run of the verb.
class Diff {
 public:
  Diff(const Arguments& arguments, Context& context, Side a, Side b)
      : arguments_(arguments),
        context_(context),
        a_(std::move(a)),
        b_(std::move(b)) {}

  ExitCode Run();

 private:
  // `what` is for scripts, `text` for people.
  void Differ(char mark, const std::string& key, absl::string_view what,
              std::string text, Json details = Json::object());
  void NotCompared(const std::string& key, absl::string_view why);

  void CompareKey(const std::string& key, const Thing& a, const Thing& b,
                  ProgressBar& progress);
  absl::Status CompareTensors(const std::string& key, const Thing& a,
                              const Thing& b, ProgressBar& progress);
  absl::Status CompareStored(const std::string& key, const Thing& a,
                             const Thing& b);

  const Arguments& arguments_;
  Context& context_;
  Side a_;
  Side b_;
  int64_t tensors_ = 0, objects_ = 0, bytes_ = 0;  // compared
  int64_t different_ = 0, not_compared_ = 0;
  TextTable table_{{"", "KEY", "DIFFERENCE"},
                   {TextTable::Align::kLeft, TextTable::Align::kLeft,
                    TextTable::Align::kLeft}};
  Json differences_ = Json::array();
  Json unknown_ = Json::array();
};

void Diff::Differ(char mark, const std::string& key, absl::string_view what,
                  std::string text, Json details) {
  ++different_;
  if (arguments_.quiet) return;
  if (!context_.json) {
    table_.AddRow({context_.Coloured(std::string(1, mark),
                                     mark == '-'   ? Colour::kRed
                                     : mark == '+' ? Colour::kGreen
                                                   : Colour::kYellow),
                   Printable(key), std::move(text)});
    return;
  }
  Json entry = {{"key", key}, {"what", std::string(what)}};
  entry.update(details);
  differences_.push_back(std::move(entry));
}

void Diff::NotCompared(const std::string& key, absl::string_view why) {
  ++not_compared_;
  if (context_.json) {
    unknown_.push_back({{"key", key}, {"why", std::string(why)}});
    return;
  }
  table_.AddRow({"?", Printable(key), absl::StrCat("not compared: ", why)});
}

absl::Status Diff::CompareTensors(const std::string& key, const Thing& a,
                                  const Thing& b, ProgressBar& progress) {
  const TensorSpec& spec_a = a_.spec(a);
  const TensorSpec& spec_b = b_.spec(b);
  const int64_t size_a = ItemSize(spec_a.dtype);
  const int64_t size_b = ItemSize(spec_b.dtype);
  const int64_t step = kPieceBytes / std::max(size_a, size_b);
  Comparison comparison(spec_a.dtype, spec_b.dtype, spec_a.shape(),
                        arguments_.tolerance);
  std::vector<std::byte> buffer_a, buffer_b;
  int64_t in_both = 0;
  for (const Box& outer : StoredBoxes(spec_a.layout, spec_a.layout.whole())) {
    for (const Box& box : StoredBoxes(spec_b.layout, outer)) {
      const int64_t count = box.num_elements();
      in_both += count;
      for (int64_t begin = 0; begin < count; begin += step) {
        const int64_t end = std::min(begin + step, count);
        buffer_a.resize((end - begin) * size_a);
        buffer_b.resize((end - begin) * size_b);
        DSD_RETURN_IF_ERROR(a_.endpoint->Read(
            a.index, box, begin, end, spec_a.dtype, absl::MakeSpan(buffer_a)))
            << "A";
        DSD_RETURN_IF_ERROR(b_.endpoint->Read(
            b.index, box, begin, end, spec_b.dtype, absl::MakeSpan(buffer_b)))
            << "B";
        comparison.Add(box, begin, buffer_a, buffer_b);
        progress.Add(static_cast<int64_t>(buffer_a.size() + buffer_b.size()));
        if (arguments_.quiet && comparison.difference().elements > 0) {
          ++different_;
          return absl::OkStatus();
        }
      }
    }
  }
  bytes_ += in_both * size_a;
  const int64_t total = spec_a.layout.whole().num_elements();
  const int64_t in_a = total - spec_a.layout.NumUncovered();
  const int64_t in_b = total - spec_b.layout.NumUncovered();
  if (in_both != in_a || in_both != in_b) {
    const int64_t in_one = in_a + in_b - 2 * in_both;
    Differ('~', key, "coverage",
           absl::StrCat(in_one, " of ", Plural(total, "element"),
                        " are stored on one side only"),
           {{"elements", in_one}});
    return absl::OkStatus();
  }
  const Difference& d = comparison.difference();
  if (d.elements == 0) return absl::OkStatus();
  const auto number = [](const std::optional<double>& value) {
    return value.has_value() ? NumberJson(*value) : Json(nullptr);
  };
  std::string text = absl::StrCat(
      FormatCount(d.elements), " of ", Plural(total, "element"),
      d.elements == 1 ? " differs" : " differ", ", first ",
      DimsToString(d.first), ": ", NumberText(d.a), ", in B ", NumberText(d.b));
  if (d.max_abs.has_value()) {
    absl::StrAppendFormat(&text, "; at most by %.6g", *d.max_abs);
  }
  if (d.max_rel.has_value()) {
    absl::StrAppendFormat(&text, ", relative %.3g", *d.max_rel);
  }
  Differ('~', key, "values", std::move(text),
         {{"elements", d.elements},
          {"of", total},
          {"first", std::vector<int64_t>(d.first.begin(), d.first.end())},
          {"a", NumberJson(d.a)},
          {"b", NumberJson(d.b)},
          {"max_abs", number(d.max_abs)},
          {"max_rel", number(d.max_rel)}});
  return absl::OkStatus();
}

absl::Status Diff::CompareStored(const std::string& key, const Thing& a,
                                 const Thing& b) {
  const absl::StatusOr<Object> object_a = a_.checkpoint->ReadObject(a.index);
  DSD_RETURN_IF_ERROR(object_a.status()) << "A";
  const absl::StatusOr<Object> object_b = b_.checkpoint->ReadObject(b.index);
  DSD_RETURN_IF_ERROR(object_b.status()) << "B";
  std::string where;
  const ObjectVerdict verdict =
      CompareObjects(*object_a, *object_b, arguments_.tolerance, &where);
  if (verdict == ObjectVerdict::kDifferent) {
    Differ('~', key, "object", where,
           {{"a", ValueJson(*object_a)}, {"b", ValueJson(*object_b)}});
  } else if (verdict == ObjectVerdict::kUnknown) {
    // Their bytes may tell.
    const auto digest_a =
        a_.checkpoint->StoredDigest(a_.checkpoint->objects()[a.index].key);
    const auto digest_b =
        b_.checkpoint->StoredDigest(b_.checkpoint->objects()[b.index].key);
    if (!digest_a.has_value() || digest_a != digest_b) {
      NotCompared(key, absl::StrCat("it is or has ", ValueText(*object_a, 60),
                                    ", a class that is not known here"));
    }
  }
  return absl::OkStatus();
}

void Diff::CompareKey(const std::string& key, const Thing& a, const Thing& b,
                      ProgressBar& progress) {
  if (a.kind != b.kind) {
    return Differ('~', key, "kind",
                  absl::StrCat(a_.Describe(a), ", in B ", b_.Describe(b)),
                  {{"a", a_.Describe(a)}, {"b", b_.Describe(b)}});
  }
  absl::Status status;
  switch (a.kind) {
    case Thing::Kind::kTensor: {
      ++tensors_;
      const TensorSpec& spec_a = a_.spec(a);
      const TensorSpec& spec_b = b_.spec(b);
      const auto json = [](const Dims& dims) {
        return Json(std::vector<int64_t>(dims.begin(), dims.end()));
      };
      if (spec_a.shape() != spec_b.shape()) {
        return Differ(
            '~', key, "shape",
            absl::StrCat("shape ", DimsToString(spec_a.shape()), ", in B ",
                         DimsToString(spec_b.shape())),
            {{"a", json(spec_a.shape())}, {"b", json(spec_b.shape())}});
      }
      if (spec_a.dtype != spec_b.dtype && !arguments_.ignore_dtype) {
        return Differ('~', key, "dtype",
                      absl::StrCat(DTypeName(spec_a.dtype), ", in B ",
                                   DTypeName(spec_b.dtype)),
                      {{"a", std::string(DTypeName(spec_a.dtype))},
                       {"b", std::string(DTypeName(spec_b.dtype))}});
      }
      status = CompareTensors(key, a, b, progress);
      break;
    }
    case Thing::Kind::kObject:
      ++objects_;
      status = CompareStored(key, a, b);
      break;
    case Thing::Kind::kUnreadable: {
      const std::string text_a = a_.Describe(a), text_b = b_.Describe(b);
      if (text_a != text_b) {
        return Differ('~', key, "dtype",
                      absl::StrCat(text_a, ", in B ", text_b),
                      {{"a", text_a}, {"b", text_b}});
      }
      return NotCompared(key, absl::StrCat("a ", text_a, " cannot be read"));
    }
  }
  if (!status.ok()) NotCompared(key, status.message());
}

ExitCode Diff::Run() {
  int64_t total_bytes = 0;
  for (const auto& [key, a] : a_.things) {
    const auto b = b_.things.find(key);
    if (b == b_.things.end() || a.kind != Thing::Kind::kTensor) continue;
    total_bytes += 2 * a_.spec(a).layout.whole().num_elements() *
                   ItemSize(a_.spec(a).dtype);
  }
  {
    ProgressBar progress(context_, "comparing", total_bytes);
    auto a = a_.things.begin();
    auto b = b_.things.begin();
    while (a != a_.things.end() || b != b_.things.end()) {
      if (arguments_.quiet && different_ > 0) break;
      if (b == b_.things.end() ||
          (a != a_.things.end() && a->first < b->first)) {
        Differ('-', a->first, "only in A",
               absl::StrCat("only in A: ", a_.Describe(a->second)));
        ++a;
      } else if (a == a_.things.end() || b->first < a->first) {
        Differ('+', b->first, "only in B",
               absl::StrCat("only in B: ", b_.Describe(b->second)));
        ++b;
      } else {
        CompareKey(a->first, a->second, b->second, progress);
        ++a;
        ++b;
      }
    }
  }
  // What was read of each side is checked as well; the rest was not needed.
  for (const auto& [side, name] :
       {std::make_pair(&a_, "A"), std::make_pair(&b_, "B")}) {
    const absl::Status verified = side->endpoint->Verify().status();
    if (verified.ok()) continue;
    ++not_compared_;
    context_.Remark(absl::StrCat(name, ": ", verified.message()));
  }
  const ExitCode code = not_compared_ > 0 ? kExitUnreadable
                        : different_ > 0  ? kExitProblems
                                          : kExitOk;
  if (context_.json) {
    context_.Print(
        {{"a", arguments_.a},
         {"b", arguments_.b},
         {"same", code == kExitOk},
         {"differences", std::move(differences_)},
         {"not_compared", std::move(unknown_)},
         {"compared",
          {{"tensors", tensors_}, {"objects", objects_}, {"bytes", bytes_}}}});
    return code;
  }
  if (arguments_.quiet) return code;
  if (different_ + not_compared_ > 0) {
    context_.out << table_.ToString(context_.terminal.styled) << "\n";
  }
  const std::string compared =
      absl::StrCat(Plural(tensors_, "tensor"), " (", FormatBytes(bytes_),
                   ") and ", Plural(objects_, "object"), " compared",
                   arguments_.tolerance.exact() ? " bit by bit" : "");
  context_.out << context_.Bold(different_ > 0
                                    ? absl::StrCat(Plural(different_, "key"),
                                                   different_ == 1 ? " differs"
                                                                   : " differ")
                                : not_compared_ > 0 ? "no difference was found"
                                                    : "the same")
               << "; " << compared << "\n";
  return code;
}

}  // namespace

VerbBody DeclareDiff(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  AddCheckpoint(app, &arguments->a, "a");
  AddCheckpoint(app, &arguments->b, "b");
  // CLI::NonNegativeNumber takes NaN.
  const auto is_tolerance = [](const std::string& text) {
    double value = 0;
    return absl::SimpleAtod(text, &value) && value >= 0 && std::isfinite(value)
               ? std::string()
               : absl::StrCat("\"", Printable(text),
                              "\" is no number of 0 or more");
  };
  app.add_option("--rtol", arguments->tolerance.rtol, "Relative tolerance")
      ->type_name("NUMBER")
      ->check(is_tolerance);
  app.add_option("--atol", arguments->tolerance.atol, "Absolute tolerance")
      ->type_name("NUMBER")
      ->check(is_tolerance);
  app.add_flag("--ignore-dtype", arguments->ignore_dtype,
               "Compare numbers of different types");
  app.add_option("--match", arguments->match,
                 "Only keys that contain this text");
  app.add_option("--a-prefix", arguments->prefix_a,
                 "Only keys of A that begin with this text, without it");
  app.add_option("--b-prefix", arguments->prefix_b, "The same of B");
  app.add_flag("-q,--quiet", arguments->quiet,
               "Print nothing, stop at the first difference");
  app.footer(kNotes);
  return [arguments](Context& context) -> absl::StatusOr<ExitCode> {
    absl::StatusOr<Side> a =
        Side::Open(arguments->a, arguments->prefix_a, arguments->match);
    absl::StatusOr<Side> b =
        Side::Open(arguments->b, arguments->prefix_b, arguments->match);
    for (const auto* side : {&a, &b}) {
      if (side->ok()) continue;
      // Never the exit code of a difference.
      context.Fail(side->status());
      return kExitUnreadable;
    }
    return Diff(*arguments, context, *std::move(a), *std::move(b)).Run();
  };
}

}  // namespace dsd::cli
