// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/plan.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/named_layout.h"
#include "dsd/frontends/cli/picture.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/traffic.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"

namespace dsd::cli {
namespace {

using checkpoint::Checkpoint;
using Align = TextTable::Align;

// A matrix of more ranks does not fit a terminal.
constexpr int kMaxMatrix = 10;
constexpr size_t kMaxPairs = 20;
constexpr int kMaxRows = 32;

struct Arguments {
  std::string directory;
  std::vector<std::string> from;
  std::vector<std::string> to;
  std::string match;
  std::string picture;
  int ranks_per_host = 0;
  int moves = 0;
};

// A redistribution that was planned.
struct Planned {
  std::string from;  // in words
  std::string to;
  Catalog source;
  Catalog target;
  int64_t bytes = 0;
  int from_ranks = 0;  // 0: files
  int to_ranks = 0;
  Binding binding{1};
  Traffic traffic;
};

absl::StatusOr<Planned> MakePlan(const Arguments& arguments,
                                 const Checkpoint& stored) {
  Planned out;
  DSD_ASSIGN_OR_RETURN(const NamedLayouts to,
                       NamedLayouts::Parse(arguments.to));
  std::vector<NamedLayouts> from;
  out.from = "the checkpoint's files";
  if (!arguments.from.empty()) {
    DSD_ASSIGN_OR_RETURN(NamedLayouts layouts,
                         NamedLayouts::Parse(arguments.from));
    out.from = layouts.ToString();
    out.from_ranks = layouts.num_ranks();
    from.push_back(std::move(layouts));
  }
  out.to = to.ToString();
  out.to_ranks = to.num_ranks();
  for (const TensorSpec& spec : stored.catalog().tensors()) {
    if (!absl::StrContains(spec.fqn, arguments.match)) continue;
    TensorSpec source = spec, target = spec;
    if (!from.empty()) {
      DSD_ASSIGN_OR_RETURN(source.layout, from[0].For(spec.fqn, spec.shape()));
    }
    DSD_ASSIGN_OR_RETURN(target.layout, to.For(spec.fqn, spec.shape()));
    out.bytes += spec.layout.whole().num_elements() * ItemSize(spec.dtype);
    DSD_RETURN_IF_ERROR(out.source.Add(std::move(source)));
    DSD_RETURN_IF_ERROR(out.target.Add(std::move(target)));
  }
  const int world = std::max(out.from_ranks, out.to_ranks);
  absl::flat_hash_map<Holder, int> rank_of;
  std::vector<int> hosts;
  for (int rank = 0; rank < world; ++rank) {
    rank_of[rank] = rank;
    if (arguments.ranks_per_host > 0) {
      hosts.push_back(rank / arguments.ranks_per_host);
    }
  }
  DSD_ASSIGN_OR_RETURN(out.binding, Binding::Create(world, rank_of, hosts));
  DSD_ASSIGN_OR_RETURN(out.traffic,
                       TrafficOf(out.source, out.target, out.binding));
  return out;
}

// "1.04 x the lower bound".
std::string AgainstBound(const Traffic& traffic) {
  if (traffic.bound == 0) return "the lower bound is 0 B";
  return absl::StrFormat(
      "%.3g x the lower bound of %s",
      static_cast<double>(traffic.ranks[traffic.busiest].busy()) /
          traffic.bound,
      FormatBytes(traffic.bound));
}

std::string BusiestText(const Traffic& traffic) {
  if (traffic.busiest < 0) return "nothing moves between ranks";
  const RankTraffic& rank = traffic.ranks[traffic.busiest];
  return absl::StrCat("busiest: rank ", traffic.busiest, ", ",
                      FormatBytes(rank.received), " in, ",
                      FormatBytes(rank.sent), " out; ", AgainstBound(traffic));
}

Json PlanJson(const Planned& plan, const Checkpoint& stored) {
  const Traffic& traffic = plan.traffic;
  Json ranks = Json::array(), pairs = Json::array();
  for (size_t rank = 0; rank < traffic.ranks.size(); ++rank) {
    const RankTraffic& r = traffic.ranks[rank];
    ranks.push_back({{"rank", rank},
                     {"has", r.has},
                     {"needs", r.needs},
                     {"read", r.read},
                     {"kept", r.kept},
                     {"received", r.received},
                     {"sent", r.sent}});
  }
  for (const auto& [pair, bytes] : traffic.pairs) {
    pairs.push_back(
        {{"from", pair.first}, {"to", pair.second}, {"bytes", bytes}});
  }
  return {
      {"path", stored.path()},
      {"from", plan.from_ranks > 0 ? Json(plan.from) : Json(nullptr)},
      {"to", plan.to},
      {"tensors", plan.source.size()},
      {"bytes", plan.bytes},
      {"moves", traffic.moves},
      {"bytes_between_ranks", traffic.between},
      {"bytes_kept", traffic.kept},
      {"bytes_read", traffic.read},
      {"busiest",
       {{"rank", traffic.busiest < 0 ? Json(nullptr) : Json(traffic.busiest)},
        {"bytes",
         traffic.busiest < 0 ? 0 : traffic.ranks[traffic.busiest].busy()},
        {"lower_bound", traffic.bound}}},
      {"ranks", std::move(ranks)},
      {"pairs", std::move(pairs)}};
}

void PrintMatrix(const Traffic& traffic, Context& context) {
  const int world = static_cast<int>(traffic.ranks.size());
  std::vector<std::string> headings = {"FROM \\ TO"};
  std::vector<Align> aligns = {Align::kLeft};
  for (int to = 0; to < world; ++to) {
    headings.push_back(absl::StrCat(to));
    aligns.push_back(Align::kRight);
  }
  TextTable table(headings, aligns);
  for (int from = 0; from < world; ++from) {
    std::vector<std::string> row = {absl::StrCat(from)};
    bool sends = false;
    for (int to = 0; to < world; ++to) {
      const auto pair = traffic.pairs.find({from, to});
      sends |= pair != traffic.pairs.end();
      row.push_back(from == to                    ? "·"
                    : pair == traffic.pairs.end() ? ""
                                                  : FormatBytes(pair->second));
    }
    if (sends) table.AddRow(std::move(row));
  }
  context.out << "\n" << table.ToString(context.terminal.styled);
}

void PrintPairs(const Traffic& traffic, Context& context) {
  std::vector<std::pair<int64_t, std::pair<int, int>>> pairs;
  for (const auto& [pair, bytes] : traffic.pairs) {
    pairs.push_back({-bytes, pair});
  }
  const size_t shown = std::min(pairs.size(), kMaxPairs);
  std::partial_sort(pairs.begin(), pairs.begin() + shown, pairs.end());
  TextTable table({"FROM", "TO", "BYTES"},
                  {Align::kRight, Align::kRight, Align::kRight});
  for (size_t i = 0; i < shown; ++i) {
    table.AddRow({absl::StrCat(pairs[i].second.first),
                  absl::StrCat(pairs[i].second.second),
                  FormatBytes(-pairs[i].first)});
  }
  context.out << "\n" << table.ToString(context.terminal.styled);
  if (shown < pairs.size()) {
    context.out << "and " << FormatCount(pairs.size() - shown)
                << " pairs with less\n";
  }
}

void PrintRanks(const Planned& plan, Context& context) {
  const bool from_files = plan.from_ranks == 0;
  TextTable table(
      {"RANK", from_files ? "READS" : "HAS", "NEEDS", "STAYS", "IN", "OUT"},
      std::vector<Align>(6, Align::kRight));
  const int world = static_cast<int>(plan.traffic.ranks.size());
  for (int rank = 0; rank < std::min(world, kMaxRows); ++rank) {
    const RankTraffic& r = plan.traffic.ranks[rank];
    table.AddRow({absl::StrCat(rank), FormatBytes(from_files ? r.read : r.has),
                  FormatBytes(r.needs), FormatBytes(r.kept),
                  FormatBytes(r.received), FormatBytes(r.sent)});
  }
  context.out << "\n" << table.ToString(context.terminal.styled);
  if (world > kMaxRows) {
    context.out << "and " << world - kMaxRows << " more ranks\n";
  }
}

absl::Status PrintMoves(const Planned& plan, int max_moves, Context& context) {
  std::vector<Plan> plans;
  const TensorPairs pairs = MatchByName(plan.source, plan.target);
  for (int rank = 0; rank < plan.binding.world_size(); ++rank) {
    DSD_ASSIGN_OR_RETURN(Plan of_rank,
                         PlanForRank(rank, plan.source, plan.target, pairs,
                                     plan.binding, plan.binding));
    plans.push_back(std::move(of_rank));
  }
  context.out << "\n" << Explain(plan.source, plan.target, plans, max_moves);
  return absl::OkStatus();
}

// Bytes per pair of ranks as a matrix, and what each rank does as bars.
Picture Draw(const Planned& plan, const Checkpoint& stored) {
  constexpr double kLeft = 70, kTop = 118, kMatrix = 560, kBars = 330;
  const Traffic& traffic = plan.traffic;
  const int world = static_cast<int>(traffic.ranks.size());
  const double cell = std::min(56.0, kMatrix / world);
  const double side = cell * world;
  const double bars_x = kLeft + side + 60;
  Picture picture(bars_x + kBars + 90, std::max(kTop + side + 50, 260.0));
  picture.AddText(20, 34, Printable(stored.path()), 900, {18, true});
  picture.AddText(20, 56,
                  absl::StrCat(Plural(plan.source.size(), "tensor"), ", ",
                               FormatBytes(plan.bytes), ": from ", plan.from,
                               " to ", plan.to),
                  900, {13, false, "#555"});
  picture.AddText(20, 76, BusiestText(traffic), 900, {13, false, "#555"});

  int64_t most = 1;
  for (const auto& [pair, bytes] : traffic.pairs) most = std::max(most, bytes);
  picture.AddText(kLeft, kTop - 22, "to rank", side, {11, true, "#555"});
  picture.AddText(20, kTop + 12, "from", 60, {11, true, "#555"});
  const int every = static_cast<int>(std::ceil(14 / cell));
  for (int rank = 0; rank < world; ++rank) {
    const double middle = (rank + 0.5) * cell;
    if (rank % every == 0) {
      picture.AddText(kLeft + middle, kTop - 6, absl::StrCat(rank), 100,
                      {11, false, "#555", Anchor::kMiddle});
      picture.AddText(kLeft - 8, kTop + middle + 4, absl::StrCat(rank), 100,
                      {11, false, "#555", Anchor::kEnd});
    }
  }
  picture.AddBox({kLeft, kTop, side, side}, "#f7f7f7", "", {"#ccc", 1});
  for (int rank = 0; rank < world; ++rank) {
    picture.AddBox({kLeft + rank * cell, kTop + rank * cell, cell, cell},
                   "#ececec",
                   absl::StrCat("rank ", rank, " keeps ",
                                FormatBytes(traffic.ranks[rank].kept)));
  }
  for (const auto& [pair, bytes] : traffic.pairs) {
    const double part = static_cast<double>(bytes) / most;
    const Area area = {kLeft + pair.second * cell, kTop + pair.first * cell,
                       cell, cell};
    picture.AddBox(area,
                   absl::StrFormat("hsl(215,75%%,%.0f%%)", 92 - 50 * part),
                   absl::StrCat("rank ", pair.first, " to rank ", pair.second,
                                ": ", FormatBytes(bytes)),
                   {"#fff", 0.5});
    const std::string text = FormatBytes(bytes);
    if (Picture::WidthOf(text, 10) < cell - 2) {
      picture.AddText(
          area.x + cell / 2, area.y + cell / 2 + 4, text, cell,
          {10, false, part > 0.5 ? "#fff" : "#222", Anchor::kMiddle});
    }
  }

  // What each rank receives and sends, against the bound.
  int64_t longest = std::max<int64_t>(traffic.bound, 1);
  for (const RankTraffic& r : traffic.ranks) {
    longest = std::max({longest, r.busy(), r.read});
  }
  struct Bar {
    const char* name;
    std::string colour;
    int64_t RankTraffic::*bytes;
  };
  std::vector<Bar> bars = {{"received", ColourOf(0), &RankTraffic::received},
                           {"sent", ColourOf(1), &RankTraffic::sent}};
  if (plan.from_ranks == 0) {
    bars.insert(bars.begin(), {"read", ColourOf(2), &RankTraffic::read});
  }
  double legend_x = bars_x;
  for (const Bar& bar : bars) {
    picture.AddBox({legend_x, kTop - 30, 10, 10}, bar.colour);
    picture.AddText(legend_x + 14, kTop - 21, bar.name, 80, {11});
    legend_x += 80;
  }
  const double thickness = cell * 0.8 / bars.size();
  for (int rank = 0; rank < world; ++rank) {
    for (size_t i = 0; i < bars.size(); ++i) {
      const int64_t bytes = traffic.ranks[rank].*bars[i].bytes;
      if (bytes == 0) continue;
      picture.AddBox({bars_x, kTop + rank * cell + cell * 0.1 + i * thickness,
                      std::max(1.0, kBars * bytes / longest), thickness},
                     bars[i].colour,
                     absl::StrCat("rank ", rank, " ", bars[i].name, " ",
                                  FormatBytes(bytes)));
    }
  }
  const double bound_x = bars_x + kBars * traffic.bound / longest;
  picture.AddBox({bound_x, kTop, 1, side}, "#d33");
  picture.AddText(bound_x, kTop + side + 16,
                  absl::StrCat("lower bound ", FormatBytes(traffic.bound)), 300,
                  {11, false, "#d33", Anchor::kMiddle});
  return picture;
}

absl::StatusOr<ExitCode> Run(const Arguments& arguments, Context& context) {
  absl::Status problem;
  DSD_ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> stored,
                       OpenAnyway(arguments.directory, &problem));
  if (!problem.ok()) context.Remark(problem.message());
  const ExitCode code = problem.ok() ? kExitOk : kExitProblems;
  DSD_ASSIGN_OR_RETURN(const Planned plan, MakePlan(arguments, *stored));
  if (!arguments.picture.empty()) {
    const absl::Status written = WritePicture(Draw(plan, *stored), "dsd plan",
                                              arguments.picture, context);
    if (!written.ok()) {
      context.Fail(written);
      return kExitOutput;
    }
    if (arguments.picture == "-") return code;
  }
  if (context.json) {
    context.Print(PlanJson(plan, *stored));
    return code;
  }
  const Traffic& traffic = plan.traffic;
  context.out << context.Bold(absl::StrCat(Plural(plan.source.size(), "tensor"),
                                           ", ", FormatBytes(plan.bytes)))
              << ": from " << plan.from << " to " << plan.to << "\n";
  PrintRanks(plan, context);
  if (!traffic.pairs.empty()) {
    if (static_cast<int>(traffic.ranks.size()) <= kMaxMatrix) {
      PrintMatrix(traffic, context);
    } else {
      PrintPairs(traffic, context);
    }
  }
  context.out << "\n"
              << Plural(traffic.moves, "move") << ": "
              << FormatBytes(traffic.between) << " between ranks, "
              << FormatBytes(traffic.kept) << " stay where they are"
              << (plan.from_ranks == 0 ? " read" : "") << "\n"
              << context.Bold(BusiestText(traffic)) << "\n";
  if (arguments.moves > 0) {
    DSD_RETURN_IF_ERROR(PrintMoves(plan, arguments.moves, context));
  }
  return code;
}

}  // namespace

VerbBody DeclarePlan(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  AddCheckpoint(app, &arguments->directory);
  app.add_option("--to", arguments->to, "LAYOUT to go to; may be repeated")
      ->required()
      ->type_name("LAYOUT")
      ->allow_extra_args(false);
  app.add_option("--from", arguments->from,
                 "LAYOUT to come from; else the checkpoint's files")
      ->type_name("LAYOUT")
      ->allow_extra_args(false);
  app.add_option("--ranks-per-host", arguments->ranks_per_host,
                 "Ranks on one host; else all are")
      ->check(AtLeast(1));
  app.add_option("--match", arguments->match,
                 "Only keys that contain this text");
  app.add_option("--moves", arguments->moves,
                 "Explain so many of the moves, one by one")
      ->check(AtLeast(0));
  app.add_option("-o,--output", arguments->picture,
                 "Draw it: a file .svg or .html, or - for SVG on the output");
  app.footer(kLayoutHelp);
  return [arguments](Context& context) { return Run(*arguments, context); };
}

}  // namespace dsd::cli
