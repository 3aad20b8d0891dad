// SPDX-License-Identifier: Apache-2.0
//
// Flat layouts: intervals of the row-major tensor, kept as 1-dim cells of
// constant holder set and lowered to boxes only when asked.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout_impl.h"

namespace dsd {
namespace {

constexpr size_t kMaxListed = 8;

// The flat index of the first element of `box` at or after flat index `from`;
// -1 if there is none.
int64_t NextInBox(const Dims& shape, const Box& box, int64_t from) {
  Dims at(shape.size());
  int64_t rest = from;
  for (int d = box.ndim(); d-- > 0;) {
    at[d] = rest % shape[d];
    rest /= shape[d];
  }
  if (rest > 0) return -1;  // after the last element of the tensor
  for (int d = 0; d < box.ndim(); ++d) {
    if (at[d] >= box.lo[d] && at[d] < box.hi[d]) continue;
    int next = d;
    if (at[d] >= box.hi[d]) {
      do {
        if (next == 0) return -1;
        --next;
      } while (at[next] + 1 >= box.hi[next]);
      ++at[next];
      ++next;
    }
    std::copy(box.lo.begin() + next, box.lo.end(), at.begin() + next);
    break;
  }
  return FlatIndex(shape, at);
}

}  // namespace

struct Layout::FlatImpl final : Layout::Impl {
  FlatImpl(Dims shape, std::vector<FlatInterval> sorted)
      : Impl(Kind::kFlat, std::move(shape)), intervals(std::move(sorted)) {}

  // Cuts the tensor at every end of an interval. InvalidArgument if kAnyHolder
  // shares an element.
  absl::Status BuildCells() {
    struct End {
      int64_t at;
      bool begins;
      Holder holder;
    };
    std::vector<End> ends;
    for (const FlatInterval& interval : intervals) {
      if (interval.begin == interval.end) continue;
      ends.push_back({interval.begin, true, interval.holder});
      ends.push_back({interval.end, false, interval.holder});
    }
    std::sort(ends.begin(), ends.end(),
              [](const End& a, const End& b) { return a.at < b.at; });
    std::vector<Holder> active;  // ascending
    uncovered = whole.num_elements();
    for (size_t i = 0; i < ends.size(); ++i) {
      const auto it =
          std::lower_bound(active.begin(), active.end(), ends[i].holder);
      if (ends[i].begins) {
        active.insert(it, ends[i].holder);
      } else {
        active.erase(it);
      }
      if (i + 1 < ends.size() && ends[i + 1].at == ends[i].at) continue;
      if (active.size() > 1 && active[0] == kAnyHolder) {
        return absl::InvalidArgumentError(absl::StrCat(
            "flat layout of tensor ", DimsToString(shape), ": element ",
            ends[i].at, " is both on kAnyHolder and on holder ", active[1]));
      }
      cuts.push_back(ends[i].at);
      holders.insert(holders.end(), active.begin(), active.end());
      holders_end.push_back(holders.size());
      if (!active.empty()) uncovered -= ends[i + 1].at - ends[i].at;
    }
    return absl::OkStatus();
  }

  size_t num_cells() const { return cuts.empty() ? 0 : cuts.size() - 1; }

  absl::Span<const Holder> HoldersOfCell(size_t cell) const {
    const size_t begin = cell == 0 ? 0 : holders_end[cell - 1];
    return absl::MakeConstSpan(holders).subspan(begin,
                                                holders_end[cell] - begin);
  }

  // The cell with element `index`, or the first one after it.
  size_t CellAtOrAfter(int64_t index) const {
    const auto it = std::upper_bound(cuts.begin(), cuts.end(), index);
    return it == cuts.begin() ? 0 : it - cuts.begin() - 1;
  }

  const FlatInterval* Find(Holder holder) const {
    const auto it = std::lower_bound(
        intervals.begin(), intervals.end(), holder,
        [](const FlatInterval& a, Holder h) { return a.holder < h; });
    return it != intervals.end() && it->holder == holder ? &*it : nullptr;
  }

  std::vector<LocalBox> BoxesOf(Holder holder) const override {
    std::vector<LocalBox> boxes;
    const FlatInterval* interval = Find(holder);
    if (interval == nullptr) return boxes;
    int64_t local = 0;
    for (Box& box : LowerFlatInterval(shape, interval->begin, interval->end)) {
      const int64_t count = box.num_elements();
      boxes.push_back({std::move(box), {local}});
      local += count;
    }
    return boxes;
  }

  std::optional<Dims> LocalShape(Holder holder) const override {
    const FlatInterval* interval = Find(holder);
    if (interval == nullptr) return std::nullopt;
    return Dims{interval->end - interval->begin};
  }

  // Goes from cell to cell and jumps over those that `query` does not touch.
  void ForEachCell(const Box& query, absl::FunctionRef<void(const Cell&)> visit,
                   int64_t& operations) const override {
    int64_t at = FlatIndex(shape, query.lo);
    while (at >= 0) {
      const size_t cell = CellAtOrAfter(at);
      ++operations;
      if (cell >= num_cells()) return;
      const absl::Span<const Holder> cell_holders = HoldersOfCell(cell);
      if (at < cuts[cell]) {
        at = NextInBox(shape, query, cuts[cell]);
        continue;
      }
      if (!cell_holders.empty()) {
        for (const Box& box :
             LowerFlatInterval(shape, cuts[cell], cuts[cell + 1])) {
          if (std::optional<Box> common = Intersect(box, query)) {
            visit(Cell{*std::move(common), HolderSet::Borrow(cell_holders)});
          }
        }
      }
      at = NextInBox(shape, query, cuts[cell + 1]);
    }
  }

  void ForEachFlatCell(
      int64_t begin, int64_t end,
      absl::FunctionRef<void(int64_t, int64_t, const HolderSet&)> visit,
      int64_t& operations) const {
    for (size_t cell = CellAtOrAfter(begin);
         cell < num_cells() && cuts[cell] < end; ++cell) {
      ++operations;
      const absl::Span<const Holder> cell_holders = HoldersOfCell(cell);
      if (cell_holders.empty()) continue;
      visit(std::max(begin, cuts[cell]), std::min(end, cuts[cell + 1]),
            HolderSet::Borrow(cell_holders));
    }
  }

  int64_t NumUncovered() const override { return uncovered; }

  bool HasAnyHolder() const override {
    const FlatInterval* any = Find(kAnyHolder);
    return any != nullptr && any->begin < any->end;
  }

  std::optional<std::pair<Holder, Holder>> HolderBounds() const override {
    const size_t first = Find(kAnyHolder) != nullptr ? 1 : 0;
    if (intervals.size() == first) return std::nullopt;
    return {{intervals[first].holder, intervals.back().holder}};
  }

  void ForEachHolder(absl::FunctionRef<void(Holder)> visit) const override {
    for (const FlatInterval& interval : intervals) visit(interval.holder);
  }

  void AddTo(DigestBuilder& digest) const override {
    digest.Add(static_cast<int64_t>(intervals.size()));
    for (const FlatInterval& interval : intervals) {
      digest.Add(interval.holder).Add(interval.begin).Add(interval.end);
    }
  }

  absl::StatusOr<Layout> MapHolders(
      absl::FunctionRef<Holder(Holder)> map) const override {
    std::vector<FlatInterval> mapped = intervals;
    for (FlatInterval& interval : mapped) {
      if (interval.holder == kAnyHolder) continue;
      const Holder to = map(interval.holder);
      if (to < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("map holders: holder ", interval.holder, " becomes ",
                         to, ", which is negative"));
      }
      interval.holder = to;
    }
    absl::StatusOr<Layout> layout = FromFlatIntervals(shape, std::move(mapped));
    DSD_RETURN_IF_ERROR(layout) << "map holders";
    return layout;
  }

  std::string ToString() const override {
    std::string out = "flat";
    for (size_t i = 0; i < intervals.size(); ++i) {
      if (i == kMaxListed) {
        absl::StrAppend(&out, " and ", intervals.size() - i, " more");
        break;
      }
      absl::StrAppend(&out, " ", intervals[i].holder, ":[", intervals[i].begin,
                      ":", intervals[i].end, "]");
    }
    return out;
  }

  const std::vector<FlatInterval> intervals;  // ascending by holder
  // Cell i is [cuts[i], cuts[i + 1]); its holders end at holders_end[i].
  std::vector<int64_t> cuts;
  std::vector<Holder> holders;
  std::vector<size_t> holders_end;
  int64_t uncovered = 0;
};

absl::StatusOr<Layout> Layout::FromFlatIntervals(
    Dims shape, std::vector<FlatInterval> intervals) {
  DSD_RETURN_IF_ERROR(CheckShape(shape));
  const int64_t size = Box::Whole(shape).num_elements();
  std::sort(intervals.begin(), intervals.end(),
            [](const FlatInterval& a, const FlatInterval& b) {
              return a.holder < b.holder;
            });
  for (size_t i = 0; i < intervals.size(); ++i) {
    const FlatInterval& interval = intervals[i];
    const auto where = [&] {
      return absl::StrCat("flat layout of tensor ", DimsToString(shape),
                          ", holder ", interval.holder);
    };
    if (interval.holder < kAnyHolder) {
      return absl::InvalidArgumentError(
          absl::StrCat(where(), ": a holder must be >= 0"));
    }
    if (interval.begin < 0 || interval.begin > interval.end ||
        interval.end > size) {
      return absl::InvalidArgumentError(
          absl::StrCat(where(), ": [", interval.begin, ":", interval.end,
                       "] is not an interval of ", size, " elements"));
    }
    if (i > 0 && intervals[i - 1].holder == interval.holder) {
      return absl::InvalidArgumentError(absl::StrCat(
          where(), ": has [", intervals[i - 1].begin, ":", intervals[i - 1].end,
          "] and [", interval.begin, ":", interval.end,
          "], expected one interval; use FromBoxes for several"));
    }
  }
  auto impl =
      std::make_shared<FlatImpl>(std::move(shape), std::move(intervals));
  DSD_RETURN_IF_ERROR(impl->BuildCells());
  return Layout(std::move(impl));
}

std::optional<FlatInterval> Layout::IntervalOf(Holder holder) const {
  if (kind() != Kind::kFlat) return std::nullopt;
  const FlatInterval* interval =
      static_cast<const FlatImpl&>(*impl_).Find(holder);
  if (interval == nullptr) return std::nullopt;
  return *interval;
}

void Layout::ForEachFlatCell(
    int64_t begin, int64_t end,
    absl::FunctionRef<void(int64_t, int64_t, const HolderSet&)> visit,
    int64_t* operations) const {
  if (kind() != Kind::kFlat) return;
  int64_t uncounted = 0;
  static_cast<const FlatImpl&>(*impl_).ForEachFlatCell(
      begin, end, visit, operations != nullptr ? *operations : uncounted);
}

}  // namespace dsd
