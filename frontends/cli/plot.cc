// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/functional/function_ref.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/named_layout.h"
#include "dsd/frontends/cli/natural_order.h"
#include "dsd/frontends/cli/picture.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/treemap.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::Checkpoint;
using checkpoint::StoredChunk;

constexpr double kMapWidth = 1040;
constexpr double kMapHeight = 760;
constexpr double kLegendWidth = 300;
constexpr double kHead = 72;
constexpr double kMargin = 20;
// What is smaller is drawn as one, so that the picture is of bounded size.
constexpr double kLeastGroup = 500;  // square pixels
constexpr double kLeastMean = 120;   // ... per tensor of a group
constexpr double kLeastPart = 16;    // ... per part of a tensor
constexpr size_t kMaxLegend = 26;
constexpr char kReplicated[] = "#c4c9d4";

struct Arguments {
  std::string directory;
  std::string output;
  std::vector<std::string> to;
  std::string match;
};

// A box of a tensor and who has it: numbers of holders.
struct Part {
  Box box;
  int64_t holder = 0;
  int64_t num_holders = 1;
};

struct Shown {
  std::string key;
  std::string text;  // type and shape
  Dims shape;
  int64_t bytes = 0;
  std::vector<Part> parts;
};

struct Holders {
  std::string noun;  // "file" or "rank"
  std::vector<std::string> names;
  std::vector<int64_t> bytes;
};

// The names' common beginnings, as nested groups.
struct Group {
  std::string name;  // one or more segments
  int64_t bytes = 0;
  int64_t tensors = 0;
  std::map<std::string, std::unique_ptr<Group>, NaturalOrder> groups;
  std::vector<const Shown*> leaves;
};

void AddToGroup(const Shown& shown, Group* group) {
  std::vector<std::string> segments = absl::StrSplit(shown.key, '.');
  segments.pop_back();
  group->bytes += shown.bytes;
  ++group->tensors;
  for (std::string& segment : segments) {
    std::unique_ptr<Group>& next = group->groups[segment];
    if (next == nullptr) {
      next = std::make_unique<Group>();
      next->name = segment;
    }
    group = next.get();
    group->bytes += shown.bytes;
    ++group->tensors;
  }
  group->leaves.push_back(&shown);
}

// A group of one group is one: "model.layers".
void Join(Group* group) {
  while (group->leaves.empty() && group->groups.size() == 1) {
    std::unique_ptr<Group> only = std::move(group->groups.begin()->second);
    only->name = group->name.empty()
                     ? only->name
                     : absl::StrCat(group->name, ".", only->name);
    *group = std::move(*only);
  }
  for (auto& [name, child] : group->groups) Join(child.get());
}

class Plot {
 public:
  Plot(const Holders& holders, Picture& picture)
      : holders_(holders), picture_(picture) {}

  void Draw(const Group& group, Area area, int depth);

 private:
  // `name`: what of the key is not said around it.
  void DrawTensor(const Shown& shown, const std::string& name,
                  const Area& area);
  void DrawTogether(const Group& group, const Area& area);
  void DrawBands(const std::vector<const Shown*>& tensors, int64_t bytes,
                 const std::string& hint, const Area& area);
  std::string HolderText(const Part& part) const {
    return part.num_holders == 1
               ? absl::StrCat(holders_.noun, " ",
                              Printable(holders_.names[part.holder]))
               : absl::StrCat("replicated, ", holders_.noun, "s ",
                              Printable(holders_.names[part.holder]), " and ",
                              part.num_holders - 1, " more");
  }

  const Holders& holders_;
  Picture& picture_;
};

std::string LastSegment(const std::string& key) {
  return key.substr(key.rfind('.') + 1);  // npos + 1 is 0
}

Area Inside(const Area& area, double border, double head) {
  border = std::min(border, 0.1 * std::min(area.width, area.height));
  return {area.x + border, area.y + head + border,
          std::max(0.0, area.width - 2 * border),
          std::max(0.0, area.height - head - 2 * border)};
}

void Plot::Draw(const Group& group, Area area, int depth) {
  const double surface = area.width * area.height;
  if (surface < kLeastGroup ||
      surface < kLeastMean * static_cast<double>(group.tensors)) {
    return DrawTogether(group, area);
  }
  const bool named = !group.name.empty() && area.width > 44 && area.height > 34;
  if (depth > 0 || named) {
    picture_.AddBox(area, depth % 2 == 0 ? "#fafafa" : "#f0f0f2",
                    absl::StrCat(Printable(group.name), ": ",
                                 Plural(group.tensors, "tensor"), ", ",
                                 FormatBytes(group.bytes)),
                    {"#d4d4da", 1});
  }
  if (named) {
    const std::string size = FormatBytes(group.bytes);
    const double room = area.width - 10;
    const bool with_size =
        Picture::WidthOf(size, 10) + Picture::WidthOf(group.name, 11) + 12 <
        room;
    picture_.AddText(area.x + 5, area.y + 12.5, Printable(group.name), room,
                     {11, true, "#444"});
    if (with_size) {
      picture_.AddText(area.x + area.width - 5, area.y + 12.5, size, room,
                       {10, false, "#777", Anchor::kEnd});
    }
  }
  area = Inside(area, depth == 0 ? 0 : 2, named ? 16 : 0);

  struct Item {
    int64_t bytes;
    const Group* group;
    const Shown* tensor;
  };
  std::vector<Item> items;
  for (const auto& [name, child] : group.groups) {
    if (child->bytes > 0) items.push_back({child->bytes, child.get(), nullptr});
  }
  for (const Shown* shown : group.leaves) {
    if (shown->bytes > 0) items.push_back({shown->bytes, nullptr, shown});
  }
  std::stable_sort(
      items.begin(), items.end(),
      [](const Item& a, const Item& b) { return a.bytes > b.bytes; });
  std::vector<double> sizes;
  for (const Item& item : items) {
    sizes.push_back(static_cast<double>(item.bytes));
  }
  const std::vector<Area> areas = Squarify(sizes, area);
  for (size_t i = 0; i < items.size(); ++i) {
    const Area inside = Inside(areas[i], 1, 0);
    const Group* const child = items[i].group;
    if (child == nullptr) {
      DrawTensor(*items[i].tensor, LastSegment(items[i].tensor->key), inside);
    } else if (child->tensors == 1 && child->leaves.size() == 1) {
      // A box around one would say nothing.
      const Shown& shown = *child->leaves[0];
      DrawTensor(shown, absl::StrCat(child->name, ".", LastSegment(shown.key)),
                 inside);
    } else {
      Draw(*child, inside, depth + 1);
    }
  }
}

void Plot::DrawTogether(const Group& group, const Area& area) {
  std::vector<const Shown*> tensors;
  std::vector<const Group*> todo = {&group};
  while (!todo.empty()) {
    const Group* const next = todo.back();
    todo.pop_back();
    for (const auto& [name, child] : next->groups) todo.push_back(child.get());
    tensors.insert(tensors.end(), next->leaves.begin(), next->leaves.end());
  }
  DrawBands(
      tensors, group.bytes,
      absl::StrCat(Printable(group.name), ": ", Plural(group.tensors, "tensor"),
                   ", ", FormatBytes(group.bytes)),
      area);
}

// What is too small to be drawn part by part: a band per holder.
void Plot::DrawBands(const std::vector<const Shown*>& tensors, int64_t bytes,
                     const std::string& hint, const Area& area) {
  std::map<int64_t, double> bytes_of;
  for (const Shown* shown : tensors) {
    int64_t total = 0;
    for (const Part& part : shown->parts) total += part.box.num_elements();
    for (const Part& part : shown->parts) {
      bytes_of[part.num_holders == 1 ? part.holder : -1] +=
          static_cast<double>(shown->bytes) * part.box.num_elements() /
          std::max<int64_t>(total, 1);
    }
  }
  const bool upright = area.height > area.width;
  const double side = upright ? area.height : area.width;
  double at = 0;
  for (const auto& [holder, part] : bytes_of) {
    const double length = part / bytes * side;
    // Bands that nobody sees are left out.
    if (length >= 0.3) {
      picture_.AddBox(upright ? Area{area.x, area.y + at, area.width, length}
                              : Area{area.x + at, area.y, length, area.height},
                      holder < 0 ? kReplicated : ColourOf(holder), hint);
    }
    at += length;
  }
}

// The dimensions along which a tensor is cut, alternately down and across; each
// finer one within a part of the one before.
class Cuts {
 public:
  Cuts(const Shown& shown) : shape_(shown.shape) {
    cuts_.resize(shape_.size());
    for (size_t d = 0; d < shape_.size(); ++d) {
      std::vector<int64_t>& cuts = cuts_[d];
      for (const Part& part : shown.parts) {
        cuts.push_back(part.box.lo[d]);
        cuts.push_back(part.box.hi[d]);
      }
      std::sort(cuts.begin(), cuts.end());
      cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
      if (cuts.size() > 2) dims_.push_back(d);
    }
  }

  // Rectangles of a box, in the unit square.
  void ForEach(const Box& box,
               absl::FunctionRef<void(const Area&)> visit) const {
    Visit(box, 0, {0, 0, 1, 1}, visit);
  }

 private:
  void Visit(const Box& box, size_t next, Area area,
             absl::FunctionRef<void(const Area&)> visit) const {
    if (next == dims_.size()) return visit(area);
    const size_t d = dims_[next];
    // A one-dimensional tensor lies across.
    const bool down = shape_.size() > 1 && next % 2 == 0;
    const auto narrow = [&](int64_t lo, int64_t hi) {
      const double from = static_cast<double>(lo) / shape_[d];
      const double size = static_cast<double>(hi - lo) / shape_[d];
      return down ? Area{area.x, area.y + from * area.height, area.width,
                         size * area.height}
                  : Area{area.x + from * area.width, area.y, size * area.width,
                         area.height};
    };
    // Only where something finer follows in the same direction is a box cut.
    if (next + 2 >= dims_.size()) {
      return Visit(box, next + 1, narrow(box.lo[d], box.hi[d]), visit);
    }
    const std::vector<int64_t>& cuts = cuts_[d];
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      if (cuts[i] < box.lo[d] || cuts[i + 1] > box.hi[d]) continue;
      Visit(box, next + 1, narrow(cuts[i], cuts[i + 1]), visit);
    }
  }

  const Dims shape_;
  std::vector<std::vector<int64_t>> cuts_;  // by dimension, with both ends
  std::vector<size_t> dims_;                // that are cut
};

void Plot::DrawTensor(const Shown& shown, const std::string& name,
                      const Area& area) {
  const std::string hint = absl::StrCat(Printable(shown.key), "  ", shown.text,
                                        ", ", FormatBytes(shown.bytes));
  const double surface = area.width * area.height;
  if (surface < kLeastPart * static_cast<double>(shown.parts.size())) {
    DrawBands({&shown}, shown.bytes, hint, area);
  } else {
    picture_.AddBox(area, "#fff", hint);
    const Cuts cuts(shown);
    const bool outlined =
        surface > 60.0 * static_cast<double>(shown.parts.size());
    for (const Part& part : shown.parts) {
      const std::string part_hint =
          absl::StrCat(hint, "\n", part.box.ToString(), " ", HolderText(part));
      cuts.ForEach(part.box, [&](const Area& unit) {
        picture_.AddBox(
            {area.x + unit.x * area.width, area.y + unit.y * area.height,
             unit.width * area.width, unit.height * area.height},
            part.num_holders > 1 ? kReplicated : ColourOf(part.holder),
            part_hint,
            {outlined && shown.parts.size() > 1 ? "#fff" : "none", 0.7});
      });
    }
  }
  if (area.width < 36 || area.height < 16) return;
  picture_.AddText(area.x + 4, area.y + 13, Printable(name), area.width - 6,
                   {11, false, "#222", Anchor::kStart, true});
  if (area.height > 32 && Picture::WidthOf(shown.text, 9.5) < area.width - 6) {
    picture_.AddText(area.x + 4, area.y + 25, shown.text, area.width - 6,
                     {9.5, false, "#333", Anchor::kStart, true});
  }
}

// The stored parts, by file.
void ShowStored(const Checkpoint& stored, const std::string& match,
                Holders* holders, std::vector<Shown>* tensors) {
  holders->noun = "file";
  // In the order of their names.
  std::map<std::string, int64_t> files;
  for (size_t i = 0; i < stored.catalog().size(); ++i) {
    for (const StoredChunk& chunk : stored.Chunks(i)) files[chunk.file] = 0;
  }
  for (auto& [name, number] : files) {
    number = static_cast<int64_t>(holders->names.size());
    holders->names.push_back(name);
  }
  holders->bytes.resize(files.size(), 0);
  for (size_t i = 0; i < stored.catalog().size(); ++i) {
    const TensorSpec& spec = stored.catalog()[i];
    if (!absl::StrContains(spec.fqn, match)) continue;
    Shown shown{spec.fqn};
    for (const StoredChunk& chunk : stored.Chunks(i)) {
      const int64_t file = files[chunk.file];
      holders->bytes[file] += chunk.box.num_elements() * ItemSize(spec.dtype);
      shown.parts.push_back({chunk.box, file, 1});
    }
    tensors->push_back(std::move(shown));
  }
}

// The parts by rank, as in `layouts`.
absl::Status ShowLayouts(const Checkpoint& stored, const std::string& match,
                         const NamedLayouts& layouts, Holders* holders,
                         std::vector<Shown>* tensors) {
  holders->noun = "rank";
  for (int rank = 0; rank < layouts.num_ranks(); ++rank) {
    holders->names.push_back(absl::StrCat(rank));
  }
  holders->bytes.resize(layouts.num_ranks(), 0);
  for (const TensorSpec& spec : stored.catalog().tensors()) {
    if (!absl::StrContains(spec.fqn, match)) continue;
    DSD_ASSIGN_OR_RETURN(const Layout layout,
                         layouts.For(spec.fqn, spec.shape()));
    Shown shown{spec.fqn};
    layout.ForEachCell(layout.whole(), [&](const Cell& cell) {
      const int64_t bytes = cell.box.num_elements() * ItemSize(spec.dtype);
      for (int64_t i = 0; i < cell.holders.size(); ++i) {
        holders->bytes[cell.holders.At(i)] += bytes;
      }
      shown.parts.push_back(
          {cell.box, cell.holders.At(0), cell.holders.size()});
    });
    tensors->push_back(std::move(shown));
  }
  return absl::OkStatus();
}

void DrawLegend(const Holders& holders, bool has_replicas, Picture& picture) {
  const double x = kMargin + kMapWidth + 24;
  double y = kHead + 12;
  picture.AddText(
      x, y,
      absl::StrCat(
          Plural(static_cast<int64_t>(holders.names.size()), holders.noun)),
      kLegendWidth, {13, true});
  y += 14;
  const int64_t most =
      holders.bytes.empty()
          ? 1
          : std::max<int64_t>(1, *std::max_element(holders.bytes.begin(),
                                                   holders.bytes.end()));
  const size_t shown = std::min(holders.names.size(), kMaxLegend);
  const double room = kLegendWidth - 48;
  const double bar = kLegendWidth - 40 - 18;  // ends where the sizes end
  for (size_t i = 0; i < shown; ++i) {
    picture.AddBox({x, y, 12, 12}, ColourOf(static_cast<int64_t>(i)));
    const std::string size = FormatBytes(holders.bytes[i]);
    picture.AddText(x + 18, y + 10.5,
                    absl::StrCat(holders.noun == "rank" ? "rank " : "",
                                 Printable(holders.names[i])),
                    room - 90, {11});
    picture.AddText(x + kLegendWidth - 40, y + 10.5, size, 90,
                    {11, false, "#555", Anchor::kEnd});
    picture.AddBox({x + 18, y + 14, bar * holders.bytes[i] / most, 3},
                   ColourOf(static_cast<int64_t>(i)));
    y += 24;
  }
  if (shown < holders.names.size()) {
    picture.AddText(x, y + 10.5,
                    absl::StrCat("and ", holders.names.size() - shown, " more"),
                    room, {11, false, "#555"});
    y += 24;
  }
  if (has_replicas) {
    picture.AddBox({x, y, 12, 12}, kReplicated);
    picture.AddText(x + 18, y + 10.5, "on several ranks", room, {11});
  }
}

absl::StatusOr<ExitCode> Run(const Arguments& arguments, Context& context) {
  absl::Status problem;
  DSD_ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> stored,
                       OpenAnyway(arguments.directory, &problem));
  if (!problem.ok()) context.Remark(problem.message());
  Holders holders;
  std::vector<Shown> tensors;
  std::string layouts = "as stored";
  if (arguments.to.empty()) {
    ShowStored(*stored, arguments.match, &holders, &tensors);
  } else {
    DSD_ASSIGN_OR_RETURN(const NamedLayouts to,
                         NamedLayouts::Parse(arguments.to));
    layouts = absl::StrCat("as ", to.ToString());
    DSD_RETURN_IF_ERROR(
        ShowLayouts(*stored, arguments.match, to, &holders, &tensors));
  }
  int64_t total = 0;
  bool has_replicas = false;
  for (Shown& shown : tensors) {
    const TensorSpec& spec =
        stored->catalog()[*stored->catalog().Find(shown.key)];
    shown.shape = spec.shape();
    shown.bytes = spec.layout.whole().num_elements() * ItemSize(spec.dtype);
    shown.text =
        absl::StrCat(DTypeName(spec.dtype), " ", DimsToString(spec.shape()));
    total += shown.bytes;
    for (const Part& part : shown.parts) has_replicas |= part.num_holders > 1;
  }
  Group root;
  for (const Shown& shown : tensors) AddToGroup(shown, &root);
  Join(&root);

  Picture picture(kMargin + kMapWidth + 24 + kLegendWidth + kMargin,
                  kHead + kMapHeight + kMargin);
  picture.AddText(kMargin, 32, Printable(stored->path()), kMapWidth,
                  {18, true});
  picture.AddText(
      kMargin, 54,
      absl::StrCat(Plural(static_cast<int64_t>(tensors.size()), "tensor"), ", ",
                   FormatBytes(total), ", ", layouts,
                   "; areas are bytes, colours who has them"),
      kMapWidth, {12, false, "#555"});
  const Area map = {kMargin, kHead, kMapWidth, kMapHeight};
  if (total > 0) {
    Plot(holders, picture).Draw(root, map, 0);
  } else {
    picture.AddText(kMargin, kHead + 30, "no elements", kMapWidth);
  }
  DrawLegend(holders, has_replicas, picture);
  const absl::Status written =
      WritePicture(picture, absl::StrCat("dsd plot ", stored->path()),
                   arguments.output, context);
  if (!written.ok()) {
    context.Fail(written);
    return kExitOutput;
  }
  if (context.json) {
    context.Print({{"path", stored->path()},
                   {"output", arguments.output},
                   {"tensors", tensors.size()},
                   {"bytes", total}});
  } else if (arguments.output != "-") {
    context.out << "wrote " << Printable(arguments.output) << "\n";
  }
  return problem.ok() ? kExitOk : kExitProblems;
}

}  // namespace

VerbBody DeclarePlot(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  AddCheckpoint(app, &arguments->directory);
  app.add_option("-o,--output", arguments->output,
                 "A file .svg or .html, or - for SVG on the output")
      ->required();
  app.add_option("--to", arguments->to,
                 "Who would have what in this LAYOUT; else the files")
      ->type_name("LAYOUT")
      ->allow_extra_args(false);
  app.add_option("--match", arguments->match,
                 "Only keys that contain this text");
  app.footer(kLayoutHelp);
  return [arguments](Context& context) { return Run(*arguments, context); };
}

}  // namespace dsd::cli
