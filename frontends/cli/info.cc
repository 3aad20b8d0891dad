// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::Checkpoint;
using checkpoint::StoredChunk;
using Align = TextTable::Align;

std::string FormatText(checkpoint::Format format) {
  switch (format) {
    case checkpoint::Format::kDcp:
      return "DCP, of torch.distributed.checkpoint";
    case checkpoint::Format::kSafetensors:
      return "safetensors";
    case checkpoint::Format::kTorchArchive:
      return "archive of torch.save";
  }
  return "";
}

struct Arguments {
  std::string directory;
  int64_t top = 10;
};

struct Sum {
  int64_t items = 0;
  int64_t elements = 0;
  int64_t bytes = 0;
  void Add(int64_t more_elements, int64_t more_bytes) {
    ++items;
    elements += more_elements;
    bytes += more_bytes;
  }
};

struct File {
  Sum shards;
  int64_t objects = 0;
  int64_t file_bytes = -1;  // -1: not there
};

struct Facts {
  std::map<std::string, Sum> dtypes;
  std::map<std::string, File> files;
  Sum tensors;
  int64_t shards = 0;
  int64_t sharded = 0;  // tensors in several shards
  std::vector<size_t> by_size;
};

int64_t BytesOf(const TensorSpec& spec) {
  return spec.layout.whole().num_elements() * ItemSize(spec.dtype);
}

// Of what is read: the name may be a link. -1: there is nothing.
int64_t LengthOf(const std::string& path, FileSystem& file_system) {
  const auto opened = file_system.OpenReadable(path);
  if (opened.ok()) return (*opened)->size_bytes();
  if (absl::IsNotFound(opened.status())) return -1;
  // It may not be read, but it is there.
  const auto info = file_system.Stat(path);
  return info.ok() ? info->size_bytes : -1;
}

Facts FactsOf(const Checkpoint& stored, FileSystem& file_system) {
  Facts facts;
  for (size_t i = 0; i < stored.catalog().size(); ++i) {
    const TensorSpec& spec = stored.catalog()[i];
    const int64_t elements = spec.layout.whole().num_elements();
    facts.tensors.Add(elements, BytesOf(spec));
    facts.dtypes[std::string(DTypeName(spec.dtype))].Add(elements,
                                                         BytesOf(spec));
    const std::vector<StoredChunk> chunks = stored.Chunks(i);
    facts.shards += static_cast<int64_t>(chunks.size());
    facts.sharded += chunks.size() > 1;
    for (const StoredChunk& chunk : chunks) {
      const int64_t here = chunk.box.num_elements();
      facts.files[chunk.file].shards.Add(here, here * ItemSize(spec.dtype));
    }
    facts.by_size.push_back(i);
  }
  std::stable_sort(facts.by_size.begin(), facts.by_size.end(),
                   [&stored](size_t a, size_t b) {
                     return BytesOf(stored.catalog()[a]) >
                            BytesOf(stored.catalog()[b]);
                   });
  for (const auto& object : stored.objects()) {
    ++facts.files[object.file].objects;
  }
  for (auto& [name, file] : facts.files) {
    file.file_bytes =
        LengthOf(absl::StrCat(stored.directory(), "/", name), file_system);
  }
  return facts;
}

std::string Share(int64_t part, int64_t whole) {
  return whole > 0 ? absl::StrFormat("%.1f%%", 100.0 * part / whole) : "";
}

Json InfoJson(const Checkpoint& stored, const Facts& facts, size_t top) {
  Json dtypes = Json::object(), files = Json::object(), largest = Json::array();
  for (const auto& [name, sum] : facts.dtypes) {
    dtypes[name] = {{"tensors", sum.items},
                    {"elements", sum.elements},
                    {"bytes", sum.bytes}};
  }
  for (const auto& [name, file] : facts.files) {
    files[name] = {{"shards", file.shards.items},
                   {"objects", file.objects},
                   {"tensor_bytes", file.shards.bytes},
                   {"file_bytes", file.file_bytes < 0 ? Json(nullptr)
                                                      : Json(file.file_bytes)}};
  }
  for (size_t i = 0; i < top; ++i) {
    const TensorSpec& spec = stored.catalog()[facts.by_size[i]];
    largest.push_back({{"key", spec.fqn}, {"bytes", BytesOf(spec)}});
  }
  return {{"path", stored.path()},
          {"format", std::string(FormatName(stored.format()))},
          {"save_id", stored.save_id()},
          {"digests", stored.has_digests()},
          {"tensors", facts.tensors.items},
          {"elements", facts.tensors.elements},
          {"bytes", facts.tensors.bytes},
          {"shards", facts.shards},
          {"sharded_tensors", facts.sharded},
          {"objects", stored.objects().size()},
          {"unreadable", stored.unreadable().size()},
          {"dtypes", std::move(dtypes)},
          {"files", std::move(files)},
          {"largest", std::move(largest)}};
}

void PrintInfo(const Checkpoint& stored, const Facts& facts, size_t top,
               Context& context) {
  std::ostream& out = context.out;
  const auto line = [&](absl::string_view name, absl::string_view text) {
    out << context.Bold(absl::StrFormat("%-9s", name)) << text << "\n";
  };
  int64_t on_disk = 0, missing = 0;
  for (const auto& [name, file] : facts.files) {
    on_disk += std::max<int64_t>(file.file_bytes, 0);
    missing += file.file_bytes < 0;
  }
  line("format", FormatText(stored.format()));
  line("save",
       absl::StrCat(stored.save_id().empty() ? "without an id"
                                             : Printable(stored.save_id()),
                    stored.has_digests() ? ", by dsd, with content digests"
                                         : ", without content digests"));
  line("tensors",
       absl::StrCat(FormatCount(facts.tensors.items), ", ",
                    FormatBytes(facts.tensors.bytes), ", ",
                    Plural(facts.tensors.elements, "element"), ", ",
                    Plural(facts.shards, "shard"), " (",
                    facts.sharded == 0 ? "none" : FormatCount(facts.sharded),
                    " in several)"));
  if (!stored.unreadable().empty()) {
    line("", absl::StrCat("and ", stored.unreadable().size(),
                          " of types that cannot be read"));
  }
  line("objects", FormatCount(static_cast<int64_t>(stored.objects().size())));
  line(
      "files",
      absl::StrCat(FormatCount(static_cast<int64_t>(facts.files.size())), ", ",
                   FormatBytes(on_disk),
                   missing > 0 ? absl::StrCat(", ", missing, " MISSING") : ""));

  if (!facts.dtypes.empty()) {
    TextTable table({"TYPE", "TENSORS", "ELEMENTS", "SIZE", "SHARE"},
                    {Align::kLeft, Align::kRight, Align::kRight, Align::kRight,
                     Align::kRight});
    std::vector<std::pair<std::string, Sum>> rows(facts.dtypes.begin(),
                                                  facts.dtypes.end());
    std::stable_sort(rows.begin(), rows.end(),
                     [](const auto& a, const auto& b) {
                       return a.second.bytes > b.second.bytes;
                     });
    for (const auto& [name, sum] : rows) {
      table.AddRow({name, FormatCount(sum.items), FormatCount(sum.elements),
                    FormatBytes(sum.bytes),
                    Share(sum.bytes, facts.tensors.bytes)});
    }
    out << "\n" << table.ToString(context.terminal.styled);
  }
  if (top > 0) {
    TextTable table({"LARGEST TENSORS", "TYPE", "SHAPE", "SIZE", "SHARE"},
                    {Align::kLeft, Align::kLeft, Align::kLeft, Align::kRight,
                     Align::kRight});
    for (size_t i = 0; i < top; ++i) {
      const TensorSpec& spec = stored.catalog()[facts.by_size[i]];
      table.AddRow({Printable(spec.fqn), std::string(DTypeName(spec.dtype)),
                    DimsToString(spec.shape()), FormatBytes(BytesOf(spec)),
                    Share(BytesOf(spec), facts.tensors.bytes)});
    }
    out << "\n" << table.ToString(context.terminal.styled);
  }
  if (!facts.files.empty()) {
    TextTable table({"DATA FILE", "SHARDS", "OBJECTS", "TENSORS", "SIZE"},
                    {Align::kLeft, Align::kRight, Align::kRight, Align::kRight,
                     Align::kRight});
    size_t shown = 0;
    for (const auto& [name, file] : facts.files) {
      if (file.file_bytes >= 0 && shown++ >= std::max<size_t>(top, 8)) continue;
      table.AddRow(
          {Printable(name), FormatCount(file.shards.items),
           FormatCount(file.objects), FormatBytes(file.shards.bytes),
           file.file_bytes < 0 ? "missing" : FormatBytes(file.file_bytes)});
    }
    out << "\n" << table.ToString(context.terminal.styled);
    if (shown > std::max<size_t>(top, 8)) {
      out << "and " << shown - std::max<size_t>(top, 8) << " more files\n";
    }
  }
}

}  // namespace

VerbBody DeclareInfo(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  AddCheckpoint(app, &arguments->directory);
  app.add_option("--top", arguments->top, "How many of the largest tensors, 10")
      ->check(AtLeast(0));
  return [arguments](Context& context) -> absl::StatusOr<ExitCode> {
    absl::Status problem;
    DSD_ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> stored,
                         OpenAnyway(arguments->directory, &problem));
    if (!problem.ok()) context.Remark(problem.message());
    const Facts facts = FactsOf(*stored, context.env->files());
    const size_t top = std::min<size_t>(arguments->top, facts.by_size.size());
    if (context.json) {
      context.Print(InfoJson(*stored, facts, top));
    } else {
      PrintInfo(*stored, facts, top, context);
    }
    const bool missing = std::any_of(
        facts.files.begin(), facts.files.end(),
        [](const auto& file) { return file.second.file_bytes < 0; });
    return problem.ok() && !missing ? kExitOk : kExitProblems;
  };
}

}  // namespace dsd::cli
