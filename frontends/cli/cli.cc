// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/cli.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/env.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/value_text.h"
#include "nlohmann/json.hpp"

namespace dsd::cli {
namespace {

using Json = nlohmann::ordered_json;
using checkpoint::Checkpoint;
using checkpoint::CheckpointDigests;
using checkpoint::KeyDigest;
using checkpoint::Problem;
using checkpoint::StoredChunk;
using checkpoint::VerifyReport;

constexpr size_t kValueColumn = 40;

constexpr char kFooter[] =
    "A checkpoint is a directory that torch.distributed.checkpoint or dsd "
    "wrote. "
    "Nothing\nin it is executed.\n\n"
    "Exit codes:\n"
    "  0  done; for verify: no problems\n"
    "  1  problems in the checkpoint's content, all listed\n"
    "  2  wrong arguments\n"
    "  3  no checkpoint there, not complete, or it cannot be opened\n"
    "  4  the output could not be written\n";

struct Arguments {
  std::string directory;
  bool json = false;
  bool tree = false;
  std::string match;
};

class Program {
 public:
  Program(const Arguments& arguments, std::ostream& out, std::ostream& err,
          bool styled)
      : arguments_(arguments), out_(out), err_(err), styled_(styled) {}

  int List();
  int Verify();
  int Digest();

 private:
  using Opened = absl::StatusOr<std::shared_ptr<const Checkpoint>>;

  // Opens what can be opened: without its digests if these are damaged, or do
  // not fit the index, which goes to `problem`.
  Opened OpenAnyway(absl::Status* problem) {
    checkpoint::OpenOptions options;
    Opened opened = Checkpoint::Open(arguments_.directory, options);
    if (!absl::IsDataLoss(opened.status())) return opened;
    *problem = opened.status();
    options.verify = false;
    return Checkpoint::Open(arguments_.directory, options);
  }

  int Fail(const absl::Status& status) {
    if (arguments_.json) {
      Print({{"error", std::string(status.message())},
             {"code", absl::StatusCodeToString(status.code())}});
    } else {
      err_ << "dsd: " << status.message() << "\n";
    }
    return absl::IsDataLoss(status) ? kExitProblems : kExitUnreadable;
  }

  void Print(const Json& json) {
    out_ << json.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
  }

  std::string Bold(absl::string_view text) const {
    return styled_ ? absl::StrCat("\033[1m", text, "\033[0m")
                   : std::string(text);
  }

  bool Wanted(absl::string_view key) const {
    return absl::StrContains(key, arguments_.match);
  }

  const Arguments& arguments_;
  std::ostream& out_;
  std::ostream& err_;
  const bool styled_;
};

// A line of `ls`: a tensor or an object.
struct Entry {
  std::string key;
  Path path;
  std::string type;
  std::string shape;
  std::string size;
  std::string shards;
  std::string value;
};

Json PathJson(const Path& path) {
  Json out = Json::array();
  for (const PathSegment& segment : path) {
    std::visit([&out](const auto& v) { out.push_back(v); }, segment);
  }
  return out;
}

std::string SegmentText(const PathSegment& segment) {
  if (const auto* text = std::get_if<std::string>(&segment)) {
    return Printable(*text);
  }
  return absl::StrCat("[", std::get<int64_t>(segment), "]");
}

// The common way into nested names, drawn with lines.
class Tree {
 public:
  void Add(const Path& path, size_t entry) {
    Node* node = &root_;
    for (const PathSegment& segment : path) {
      const auto [it, is_new] =
          node->index.try_emplace(segment, node->children.size());
      if (is_new) node->children.emplace_back(segment, Node());
      node = &node->children[it->second].second;
    }
    node->entry = static_cast<int64_t>(entry);
  }

  // Calls line(text, entry) for each line; entry is -1 for inner ones.
  template <class Line>
  void Draw(Line line) const {
    Draw(root_, "", true, line);
  }

 private:
  struct Node {
    std::vector<std::pair<PathSegment, Node>> children;
    absl::flat_hash_map<PathSegment, size_t> index;  // of children
    int64_t entry = -1;
  };

  template <class Line>
  static void Draw(const Node& node, const std::string& indent, bool top,
                   Line line) {
    for (size_t i = 0; i < node.children.size(); ++i) {
      const auto& [segment, child] = node.children[i];
      const bool last = i + 1 == node.children.size();
      line(absl::StrCat(indent,
                        top    ? ""
                        : last ? "└─ "
                               : "├─ ",
                        SegmentText(segment)),
           child.entry);
      Draw(child, top ? "" : absl::StrCat(indent, last ? "   " : "│  "), false,
           line);
    }
  }

  Node root_;
};

int Program::List() {
  absl::Status problem;
  const Opened opened = OpenAnyway(&problem);
  if (!opened.ok()) return Fail(opened.status());
  int exit_code = problem.ok() ? kExitOk : kExitProblems;
  if (!problem.ok()) err_ << "dsd: " << problem.message() << "\n";
  const Checkpoint& stored = **opened;

  std::vector<Entry> entries;
  Json tensors = Json::array(), objects = Json::array(),
       unreadable = Json::array();
  int64_t num_elements = 0, num_bytes = 0, num_chunks = 0, num_tensors = 0;
  int64_t num_objects = 0;
  std::set<std::string> files;
  for (size_t i = 0; i < stored.catalog().size(); ++i) {
    const TensorSpec& spec = stored.catalog()[i];
    if (!Wanted(spec.fqn)) continue;
    const std::vector<StoredChunk> chunks = stored.Chunks(i);
    const int64_t elements = spec.layout.whole().num_elements();
    const int64_t bytes = elements * ItemSize(spec.dtype);
    ++num_tensors;
    num_elements += elements;
    num_bytes += bytes;
    num_chunks += static_cast<int64_t>(chunks.size());
    for (const StoredChunk& chunk : chunks) files.insert(chunk.file);
    if (arguments_.json) {
      Json places = Json::array();
      for (const StoredChunk& chunk : chunks) {
        places.push_back(
            {{"offsets", Json(std::vector<int64_t>(chunk.box.lo.begin(),
                                                   chunk.box.lo.end()))},
             {"sizes",
              [&] {
                const Dims sizes = chunk.box.extents();
                return Json(std::vector<int64_t>(sizes.begin(), sizes.end()));
              }()},
             {"file", chunk.file},
             {"offset", chunk.offset_bytes},
             {"length", chunk.length_bytes}});
      }
      tensors.push_back({{"key", spec.fqn},
                         {"path", PathJson(stored.tensor_path(i))},
                         {"dtype", std::string(DTypeName(spec.dtype))},
                         {"shape", std::vector<int64_t>(spec.shape().begin(),
                                                        spec.shape().end())},
                         {"bytes", bytes},
                         {"chunks", std::move(places)}});
    } else {
      entries.push_back({spec.fqn, stored.tensor_path(i),
                         std::string(DTypeName(spec.dtype)),
                         DimsToString(spec.shape()), FormatBytes(bytes),
                         absl::StrCat(chunks.size()), ""});
    }
  }
  for (const auto& [key, dtype] : stored.unreadable()) {
    if (!Wanted(key)) continue;
    unreadable.push_back({{"key", key}, {"dtype", dtype}});
    entries.push_back({key, {key}, dtype, "", "", "", "cannot be read"});
  }
  for (size_t i = 0; i < stored.objects().size(); ++i) {
    const checkpoint::StoredObject& object = stored.objects()[i];
    if (!Wanted(object.key)) continue;
    ++num_objects;
    files.insert(object.file);
    const absl::StatusOr<Object> value = stored.ReadObject(i);
    if (!value.ok()) {
      err_ << "dsd: " << value.status().message() << "\n";
      exit_code = kExitProblems;
    }
    if (arguments_.json) {
      Json entry = {{"key", object.key},
                    {"path", PathJson(object.path)},
                    {"file", object.file},
                    {"offset", object.offset_bytes},
                    {"length", object.length_bytes}};
      if (value.ok()) {
        entry["type"] = std::string(value->kind_name());
        entry["value"] = ValueJson(*value);
      } else {
        entry["error"] = std::string(value.status().message());
      }
      objects.push_back(std::move(entry));
    } else {
      entries.push_back(
          {object.key, object.path,
           value.ok() ? Printable(value->kind_name()) : "object", "", "", "",
           value.ok() ? ValueText(*value, kValueColumn) : "unreadable"});
    }
  }

  if (arguments_.json) {
    Print({{"directory", stored.directory()},
           {"save_id", stored.save_id()},
           {"digests", stored.has_digests()},
           {"tensors", std::move(tensors)},
           {"objects", std::move(objects)},
           {"unreadable", std::move(unreadable)},
           {"totals",
            {{"tensors", num_tensors},
             {"elements", num_elements},
             {"bytes", num_bytes},
             {"chunks", num_chunks},
             {"objects", num_objects},
             {"files", files.size()}}}});
    return exit_code;
  }

  using Align = TextTable::Align;
  TextTable table({"KEY", "TYPE", "SHAPE", "SIZE", "SHARDS", "VALUE"},
                  {Align::kLeft, Align::kLeft, Align::kLeft, Align::kRight,
                   Align::kRight, Align::kLeft});
  const auto add = [&table](const std::string& name, const Entry& e) {
    table.AddRow({name, e.type, e.shape, e.size, e.shards, e.value});
  };
  if (arguments_.tree) {
    Tree tree;
    for (size_t i = 0; i < entries.size(); ++i) tree.Add(entries[i].path, i);
    tree.Draw([&](const std::string& text, int64_t entry) {
      add(text, entry < 0 ? Entry() : entries[entry]);
    });
  } else {
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return a.key < b.key; });
    for (const Entry& entry : entries) add(Printable(entry.key), entry);
  }
  if (!entries.empty()) out_ << table.ToString(styled_) << "\n";
  out_ << Bold(absl::StrCat(Plural(num_tensors, "tensor"), ", ",
                            FormatBytes(num_bytes)))
       << " (" << Plural(num_elements, "element") << " in "
       << Plural(num_chunks, "shard") << "); " << Plural(num_objects, "object")
       << "; " << Plural(static_cast<int64_t>(files.size()), "data file")
       << "\n";
  out_ << "save "
       << (stored.save_id().empty() ? "without an id"
                                    : Printable(stored.save_id()))
       << (stored.has_digests() ? ", with content digests (dsd verify checks "
                                  "them)"
                                : ", without content digests")
       << "\n";
  return exit_code;
}

int Program::Verify() {
  int exit_code = kExitOk;
  std::vector<Problem> problems;
  absl::Status problem;
  const Opened opened = OpenAnyway(&problem);
  if (!problem.ok()) problems.push_back({"", "", problem});
  VerifyReport report;
  bool has_digests = false;
  if (opened.ok()) {
    report = checkpoint::Verify(**opened);
    has_digests = (*opened)->has_digests();
  } else if (problems.empty()) {
    return Fail(opened.status());
  }
  problems.insert(problems.end(), report.problems.begin(),
                  report.problems.end());
  if (!problems.empty()) exit_code = kExitProblems;

  if (arguments_.json) {
    Json list = Json::array();
    for (const Problem& problem : problems) {
      list.push_back({{"key", problem.key},
                      {"file", problem.file},
                      {"code", absl::StatusCodeToString(problem.status.code())},
                      {"text", std::string(problem.status.message())}});
    }
    Print({{"directory", arguments_.directory},
           {"ok", problems.empty()},
           {"tensors", report.tensors},
           {"objects", report.objects},
           {"chunks", report.chunks},
           {"bytes_read", report.bytes},
           {"digests_compared", report.compared},
           {"problems", std::move(list)},
           {"unreferenced_files", report.unreferenced}});
    return exit_code;
  }
  for (const Problem& problem : problems) {
    const std::string text(problem.status.message());
    out_ << Bold("problem");
    // Most texts say where; the others are short.
    if (!problem.key.empty() &&
        !absl::StrContains(text, absl::CHexEscape(problem.key))) {
      out_ << " \"" << Printable(problem.key) << "\"";
    }
    if (!problem.file.empty() &&
        !absl::StrContains(text, absl::CHexEscape(problem.file))) {
      out_ << " in " << Printable(problem.file);
    }
    out_ << ": " << text << "\n";
  }
  for (const std::string& file : report.unreferenced) {
    out_ << "note: " << file
         << " is of no use to this checkpoint and can be removed\n";
  }
  if (opened.ok()) {
    out_ << "checked " << Plural(report.tensors, "tensor") << " in "
         << Plural(report.chunks, "shard") << ", "
         << Plural(report.objects, "object") << ", "
         << FormatBytes(report.bytes) << ": archives, CRCs, index"
         << (has_digests
                 ? absl::StrCat(", ", Plural(report.compared, "content digest"))
                 : std::string(" (it has no content digests)"))
         << "\n";
  }
  out_ << Bold(problems.empty()
                   ? "no problems"
                   : Plural(static_cast<int64_t>(problems.size()), "problem"))
       << "\n";
  return exit_code;
}

int Program::Digest() {
  const Opened opened = Checkpoint::Open(arguments_.directory, {});
  if (!opened.ok()) return Fail(opened.status());
  const absl::StatusOr<CheckpointDigests> digests =
      checkpoint::ComputeDigests(**opened);
  if (!digests.ok()) {
    Fail(digests.status());
    return kExitProblems;
  }
  if (arguments_.json) {
    Json keys = Json::object();
    for (const KeyDigest& key : digests->keys) {
      keys[key.key] = DigestHex(key.digest);
    }
    Print({{"directory", arguments_.directory},
           {"whole", DigestHex(digests->whole)},
           {"keys", std::move(keys)}});
    return kExitOk;
  }
  for (const KeyDigest& key : digests->keys) {
    out_ << DigestHex(key.digest) << "  " << Printable(key.key) << "\n";
  }
  out_ << Bold(DigestHex(digests->whole)) << "  (all of it)\n";
  return kExitOk;
}

void AddCommon(CLI::App* command, Arguments* arguments) {
  command
      ->add_option("directory", arguments->directory,
                   "The checkpoint's directory")
      ->required();
  command->add_flag("--json", arguments->json, "Print JSON");
}

}  // namespace

int Run(int argc, const char* const* argv, std::ostream& out, std::ostream& err,
        bool styled) {
  Arguments arguments;
  CLI::App app("Looks into distributed checkpoints.", "dsd");
  app.footer(kFooter);
  app.require_subcommand(1);
  app.get_formatter()->column_width(28);
  CLI::App* const list =
      app.add_subcommand("ls", "List keys: type, shape, size, shards, value");
  AddCommon(list, &arguments);
  list->add_flag("--tree", arguments.tree, "Show the nesting of the keys");
  list->add_option("--match", arguments.match,
                   "Only keys that contain this text");
  CLI::App* const verify = app.add_subcommand(
      "verify", "Check every byte: archives, CRCs, pickles, index, digests");
  AddCommon(verify, &arguments);
  CLI::App* const digest = app.add_subcommand(
      "digest", "Digest each key's content, whatever files it lies in");
  AddCommon(digest, &arguments);
  for (CLI::App* command : {list, verify, digest}) command->footer(kFooter);
  try {
    app.parse(argc, argv);
  } catch (const CLI::RequiredError& error) {
    if (argc > 1 && app.get_subcommands().empty()) {
      err << "dsd: there is no command \"" << Printable(argv[1])
          << "\", expected ls, verify or digest\n";
      return kExitUsage;
    }
    app.exit(error, out, err);
    return kExitUsage;
  } catch (const CLI::ParseError& error) {
    return app.exit(error, out, err) == 0 ? kExitOk : kExitUsage;
  }

  Program program(arguments, out, err, styled);
  if (list->parsed()) return program.List();
  if (verify->parsed()) return program.Verify();
  return program.Digest();
}

}  // namespace dsd::cli
