// SPDX-License-Identifier: Apache-2.0
//
// Box layouts: explicit boxes, equal ones stored once with all their holders.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/box_index.h"
#include "dsd/core/layout/layout_impl.h"

namespace dsd {
namespace {

constexpr size_t kMaxListed = 8;

// Boxes in lexicographic order of their corners, each with the holders it has.
struct HeldBoxes {
  explicit HeldBoxes(int ndim) : index(ndim) {}

  size_t size() const { return index.size(); }

  absl::Span<const Holder> HoldersOf(size_t i) const {
    const size_t begin = i == 0 ? 0 : holders_end[i - 1];
    return absl::MakeConstSpan(holders).subspan(begin, holders_end[i] - begin);
  }

  // Starts a new box; holders follow by AddHolder, ascending.
  void AddBox(const Box& box) {
    index.Add(box);
    holders_end.push_back(holders.size());
  }
  void AddHolder(Holder holder) {
    holders.push_back(holder);
    ++holders_end.back();
  }

  BoxIndex index;
  std::vector<Holder> holders;
  std::vector<size_t> holders_end;
};

bool LessByCorners(const Box& a, const Box& b) {
  return a.lo != b.lo ? a.lo < b.lo : a.hi < b.hi;
}

struct Piece {
  Box box;
  std::vector<Holder> holders;  // ascending
};

// Adds `box` to disjoint `pieces`, cutting those that it overlaps.
void AddOverlapping(const Box& box, absl::Span<const Holder> holders,
                    std::vector<Piece>& pieces) {
  std::vector<Box> rest = {box};  // what no piece has had yet
  const size_t before = pieces.size();
  for (size_t i = 0; i < before; ++i) {
    const std::optional<Box> common = Intersect(pieces[i].box, box);
    if (!common.has_value()) continue;
    for (Box& outside : Subtract(pieces[i].box, box)) {
      pieces.push_back({std::move(outside), pieces[i].holders});
    }
    std::vector<Holder> both;
    std::set_union(pieces[i].holders.begin(), pieces[i].holders.end(),
                   holders.begin(), holders.end(), std::back_inserter(both));
    pieces[i] = {*common, std::move(both)};
    std::vector<Box> left;
    for (const Box& part : rest) {
      for (Box& outside : Subtract(part, *common)) {
        left.push_back(std::move(outside));
      }
    }
    rest = std::move(left);
  }
  for (Box& part : rest) {
    pieces.push_back({std::move(part), {holders.begin(), holders.end()}});
  }
}

// Which boxes are linked by overlaps.
class Components {
 public:
  explicit Components(size_t size) : parent_(size) {
    std::iota(parent_.begin(), parent_.end(), 0);
  }
  uint32_t Of(uint32_t i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }
  void Join(uint32_t a, uint32_t b) { parent_[Of(a)] = Of(b); }

 private:
  std::vector<uint32_t> parent_;
};

std::optional<Holder> FirstCommon(absl::Span<const Holder> a,
                                  absl::Span<const Holder> b) {
  size_t i = 0;
  size_t j = 0;
  while (i < a.size() && j < b.size()) {
    if (a[i] == b[j]) return a[i];
    a[i] < b[j] ? ++i : ++j;
  }
  return std::nullopt;
}

}  // namespace

struct Layout::BoxesImpl final : Layout::Impl {
  struct Owned {  // box number `box` of `boxes` belongs to `holder`
    Holder holder;
    uint32_t box;
  };

  explicit BoxesImpl(Dims shape)
      : Impl(Kind::kBoxes, std::move(shape)), boxes(whole.ndim()) {}

  // `given` lies inside the tensor; none is empty.
  absl::Status Build(std::vector<HolderBox> given) {
    std::sort(given.begin(), given.end(),
              [](const HolderBox& a, const HolderBox& b) {
                if (a.box != b.box) return LessByCorners(a.box, b.box);
                return a.holder < b.holder;
              });
    boxes.index.Reserve(given.size());
    boxes.holders.reserve(given.size());
    owned.reserve(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      if (i == 0 || given[i].box != given[i - 1].box) {
        boxes.AddBox(given[i].box);
      } else if (given[i].holder == given[i - 1].holder) {
        return OverlapError(given[i].holder, given[i].box, given[i].box);
      } else if (given[i - 1].holder == kAnyHolder) {
        return AnyOverlapError(given[i].holder, given[i].box, given[i].box);
      }
      boxes.AddHolder(given[i].holder);
      owned.push_back(
          {given[i].holder, static_cast<uint32_t>(boxes.size() - 1)});
    }
    std::stable_sort(
        owned.begin(), owned.end(),
        [](const Owned& a, const Owned& b) { return a.holder < b.holder; });
    boxes.index.Build();
    DSD_RETURN_IF_ERROR(BuildCells());
    uncovered = whole.num_elements();
    for (size_t i = 0; i < cells().size(); ++i) {
      uncovered -= cells().index.num_elements(i);
    }
    return absl::OkStatus();
  }

  // Boxes that overlap others are cut so that each cell has one set of holders.
  absl::Status BuildCells() {
    Components components(boxes.size());
    std::vector<uint8_t> is_cut(boxes.size(), 0);
    bool any_cut = false;
    std::vector<uint32_t> found;
    for (uint32_t i = 0; i < boxes.size(); ++i) {
      boxes.index.FindOverlapping(boxes.index.box(i), found);
      for (uint32_t j : found) {
        if (j <= i) continue;
        const absl::Span<const Holder> a = boxes.HoldersOf(i);
        const absl::Span<const Holder> b = boxes.HoldersOf(j);
        if (const std::optional<Holder> both = FirstCommon(a, b)) {
          return OverlapError(*both, boxes.index.box(i), boxes.index.box(j));
        }
        if (a[0] == kAnyHolder || b[0] == kAnyHolder) {
          return AnyOverlapError(std::max(a[0], b[0]), boxes.index.box(i),
                                 boxes.index.box(j));
        }
        components.Join(i, j);
        is_cut[i] = is_cut[j] = 1;
        any_cut = true;
      }
    }
    if (!any_cut) return absl::OkStatus();

    std::vector<Piece> pieces;
    absl::flat_hash_map<uint32_t, std::vector<Piece>> cut;  // by component
    for (uint32_t i = 0; i < boxes.size(); ++i) {
      const absl::Span<const Holder> holders = boxes.HoldersOf(i);
      if (is_cut[i]) {
        AddOverlapping(boxes.index.box(i), holders, cut[components.Of(i)]);
      } else {
        pieces.push_back(
            {boxes.index.box(i), {holders.begin(), holders.end()}});
      }
    }
    for (auto& [component, parts] : cut) {
      std::move(parts.begin(), parts.end(), std::back_inserter(pieces));
    }
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
      return LessByCorners(a.box, b.box);
    });
    cut_cells.emplace(whole.ndim());
    for (const Piece& piece : pieces) {
      cut_cells->AddBox(piece.box);
      for (Holder holder : piece.holders) cut_cells->AddHolder(holder);
    }
    cut_cells->index.Build();
    return absl::OkStatus();
  }

  absl::Status OverlapError(Holder holder, const Box& a, const Box& b) const {
    return absl::InvalidArgumentError(absl::StrCat(
        "boxes of tensor ", DimsToString(shape), ": ", a.ToString(), " and ",
        b.ToString(), " of ",
        holder == kAnyHolder ? "kAnyHolder" : absl::StrCat("holder ", holder),
        " overlap; boxes of one holder must be disjoint"));
  }

  absl::Status AnyOverlapError(Holder holder, const Box& a,
                               const Box& b) const {
    return absl::InvalidArgumentError(absl::StrCat(
        "boxes of tensor ", DimsToString(shape), ": ", a.ToString(), " and ",
        b.ToString(), " overlap, one on kAnyHolder and one on holder ", holder,
        "; an element on kAnyHolder must have no other holder"));
  }

  const HeldBoxes& cells() const {
    return cut_cells.has_value() ? *cut_cells : boxes;
  }

  absl::Span<const Owned> OwnedBy(Holder holder) const {
    const auto [begin, end] = std::equal_range(
        owned.begin(), owned.end(), Owned{holder, 0},
        [](const Owned& a, const Owned& b) { return a.holder < b.holder; });
    return absl::MakeConstSpan(owned).subspan(begin - owned.begin(),
                                              end - begin);
  }

  std::vector<LocalBox> BoxesOf(Holder holder) const override {
    const absl::Span<const Owned> mine = OwnedBy(holder);
    std::vector<LocalBox> out;
    out.reserve(mine.size());
    for (const Owned& one : mine) {
      out.push_back({boxes.index.box(one.box), Dims(shape.size(), 0)});
    }
    return out;
  }

  std::optional<Dims> LocalShape(Holder) const override { return std::nullopt; }

  void ForEachCell(const Box& query, absl::FunctionRef<void(const Cell&)> visit,
                   int64_t& operations) const override {
    ++operations;
    std::vector<uint32_t> found;
    cells().index.FindOverlapping(query, found);
    for (uint32_t i : found) {
      ++operations;
      visit(Cell{*Intersect(cells().index.box(i), query),
                 HolderSet::Borrow(cells().HoldersOf(i))});
    }
  }

  int64_t NumUncovered() const override { return uncovered; }

  bool HasAnyHolder() const override {
    return !owned.empty() && owned.front().holder == kAnyHolder;
  }

  std::optional<std::pair<Holder, Holder>> HolderBounds() const override {
    if (owned.empty() || owned.back().holder == kAnyHolder) return std::nullopt;
    if (!HasAnyHolder()) return {{owned.front().holder, owned.back().holder}};
    const size_t num_any = OwnedBy(kAnyHolder).size();
    return {{owned[num_any].holder, owned.back().holder}};
  }

  void ForEachHolder(absl::FunctionRef<void(Holder)> visit) const override {
    for (size_t i = 0; i < owned.size(); ++i) {
      if (i == 0 || owned[i].holder != owned[i - 1].holder) {
        visit(owned[i].holder);
      }
    }
  }

  void AddTo(DigestBuilder& digest) const override {
    digest.Add(static_cast<int64_t>(owned.size()));
    for (const Owned& one : owned) {
      const Box box = boxes.index.box(one.box);
      digest.Add(one.holder);
      digest.Add(absl::MakeConstSpan(box.lo));
      digest.Add(absl::MakeConstSpan(box.hi));
    }
  }

  absl::StatusOr<Layout> MapHolders(
      absl::FunctionRef<Holder(Holder)> map) const override {
    absl::flat_hash_map<Holder, Holder> from;  // mapped -> original
    std::vector<HolderBox> mapped;
    mapped.reserve(owned.size());
    Holder to = kAnyHolder;
    for (size_t i = 0; i < owned.size(); ++i) {
      const Holder holder = owned[i].holder;
      if (holder != kAnyHolder && (i == 0 || owned[i - 1].holder != holder)) {
        to = map(holder);
        const auto [at, inserted] = from.try_emplace(to, holder);
        if (!inserted || to < 0) {
          return absl::InvalidArgumentError(absl::StrCat(
              "map holders: holder ", holder, " becomes ", to,
              to < 0 ? ", which is negative"
                     : absl::StrCat(", as holder ", at->second, " does")));
        }
      }
      mapped.push_back({to, boxes.index.box(owned[i].box)});
    }
    return FromBoxes(shape, std::move(mapped));
  }

  std::string ToString() const override {
    std::string out = "boxes";
    for (size_t i = 0; i < owned.size(); ++i) {
      if (i == kMaxListed) {
        absl::StrAppend(&out, " and ", owned.size() - i, " more");
        break;
      }
      absl::StrAppend(
          &out, " ",
          owned[i].holder == kAnyHolder ? "any" : absl::StrCat(owned[i].holder),
          ":", boxes.index.box(owned[i].box).ToString());
    }
    return out;
  }

  HeldBoxes boxes;
  std::vector<Owned> owned;            // ascending by holder, then box
  std::optional<HeldBoxes> cut_cells;  // where boxes overlap in part
  int64_t uncovered = 0;
};

absl::StatusOr<Layout> Layout::FromBoxes(Dims shape,
                                         std::vector<HolderBox> boxes) {
  DSD_RETURN_IF_ERROR(CheckShape(shape));
  const Box whole = Box::Whole(shape);
  for (const HolderBox& one : boxes) {
    const auto where = [&] {
      return absl::StrCat("box from ", DimsToString(one.box.lo), " to ",
                          DimsToString(one.box.hi), " of holder ", one.holder,
                          ", tensor ", DimsToString(shape));
    };
    if (one.holder < kAnyHolder) {
      return absl::InvalidArgumentError(
          absl::StrCat(where(), ": a holder must be >= 0"));
    }
    if (one.box.lo.size() != shape.size() ||
        one.box.hi.size() != shape.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where(), ": expected ", shape.size(), " dimensions"));
    }
    if (!whole.Contains(one.box)) {
      return absl::InvalidArgumentError(
          absl::StrCat(where(), ": is not inside the tensor"));
    }
  }
  boxes.erase(
      std::remove_if(boxes.begin(), boxes.end(),
                     [](const HolderBox& one) { return one.box.empty(); }),
      boxes.end());
  auto impl = std::make_shared<BoxesImpl>(std::move(shape));
  DSD_RETURN_IF_ERROR(impl->Build(std::move(boxes)));
  return Layout(std::move(impl));
}

Layout Layout::WholeBoxes(Dims shape, const std::vector<Holder>& holders) {
  auto impl = std::make_shared<BoxesImpl>(std::move(shape));
  if (holders.empty()) {
    impl->uncovered = impl->whole.num_elements();
  } else if (!impl->whole.empty()) {
    impl->boxes.AddBox(impl->whole);
    for (Holder holder : holders) {
      impl->boxes.AddHolder(holder);
      impl->owned.push_back({holder, 0});
    }
  }
  impl->boxes.index.Build();
  return Layout(std::move(impl));
}

}  // namespace dsd
