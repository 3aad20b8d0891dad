// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/selection.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::Checkpoint;
using checkpoint::StoredChunk;

constexpr size_t kValueColumn = 40;

struct Arguments {
  std::string directory;
  bool tree = false;
  bool keys = false;
  std::string match;
};

// A line: a tensor or an object.
struct Entry {
  std::string key;
  Path path;
  std::string type;
  std::string shape;
  std::string size;
  std::string shards;
  std::string value;
};

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

Json ChunkJson(const StoredChunk& chunk) {
  const auto numbers = [](const Dims& dims) {
    return std::vector<int64_t>(dims.begin(), dims.end());
  };
  return {{"offsets", numbers(chunk.box.lo)},
          {"sizes", numbers(chunk.box.extents())},
          {"file", chunk.file},
          {"offset", chunk.offset_bytes},
          {"length", chunk.length_bytes}};
}

absl::StatusOr<ExitCode> List(const Arguments& arguments, Context& context) {
  absl::Status problem;
  DSD_ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> opened,
                       OpenAnyway(arguments.directory, &problem));
  ExitCode exit_code = problem.ok() ? kExitOk : kExitProblems;
  if (!problem.ok()) context.Remark(problem.message());
  const Checkpoint& stored = *opened;
  const auto wanted = [&arguments](absl::string_view key) {
    return absl::StrContains(key, arguments.match);
  };

  if (arguments.keys && !context.json) {
    std::vector<absl::string_view> keys;
    for (const absl::string_view key : AllKeys(stored)) {
      if (wanted(key)) keys.push_back(key);
    }
    std::sort(keys.begin(), keys.end());
    for (const absl::string_view key : keys) {
      context.out << Printable(key) << "\n";
    }
    return exit_code;
  }

  std::vector<Entry> entries;
  Json tensors = Json::array(), objects = Json::array(),
       unreadable = Json::array();
  int64_t num_elements = 0, num_bytes = 0, num_chunks = 0, num_tensors = 0;
  int64_t num_objects = 0;
  std::set<std::string> files;
  for (size_t i = 0; i < stored.catalog().size(); ++i) {
    const TensorSpec& spec = stored.catalog()[i];
    if (!wanted(spec.fqn)) continue;
    const std::vector<StoredChunk> chunks = stored.Chunks(i);
    const int64_t elements = spec.layout.whole().num_elements();
    const int64_t bytes = elements * ItemSize(spec.dtype);
    ++num_tensors;
    num_elements += elements;
    num_bytes += bytes;
    num_chunks += static_cast<int64_t>(chunks.size());
    for (const StoredChunk& chunk : chunks) files.insert(chunk.file);
    if (context.json) {
      Json places = Json::array();
      for (const StoredChunk& chunk : chunks) {
        places.push_back(ChunkJson(chunk));
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
    if (!wanted(key)) continue;
    unreadable.push_back({{"key", key}, {"dtype", dtype}});
    entries.push_back({key, {key}, dtype, "", "", "", "cannot be read"});
  }
  for (size_t i = 0; i < stored.objects().size(); ++i) {
    const checkpoint::StoredObject& object = stored.objects()[i];
    if (!wanted(object.key)) continue;
    ++num_objects;
    files.insert(object.file);
    const absl::StatusOr<Object> value = stored.ReadObject(i);
    if (!value.ok()) {
      context.Remark(value.status().message());
      exit_code = kExitProblems;
    }
    if (context.json) {
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

  if (context.json) {
    context.Print({{"path", stored.path()},
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
  if (arguments.tree) {
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
  if (!entries.empty()) {
    context.out << table.ToString(context.terminal.styled) << "\n";
  }
  context.out << context.Bold(absl::StrCat(Plural(num_tensors, "tensor"), ", ",
                                           FormatBytes(num_bytes)))
              << " (" << Plural(num_elements, "element") << " in "
              << Plural(num_chunks, "shard") << "); "
              << Plural(num_objects, "object") << "; "
              << Plural(static_cast<int64_t>(files.size()), "data file")
              << "\n";
  context.out << "save "
              << (stored.save_id().empty() ? "without an id"
                                           : Printable(stored.save_id()))
              << (stored.has_digests()
                      ? ", with content digests (dsd verify checks "
                        "them)"
                      : ", without content digests")
              << "\n";
  return exit_code;
}

}  // namespace

VerbBody DeclareLs(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  AddCheckpoint(app, &arguments->directory);
  app.add_flag("--keys", arguments->keys, "Only the keys, one a line");
  app.add_flag("--tree", arguments->tree, "Show the nesting of the keys");
  app.add_option("--match", arguments->match,
                 "Only keys that contain this text");
  return [arguments](Context& context) { return List(*arguments, context); };
}

}  // namespace dsd::cli
