// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/layout.h"

#include <algorithm>
#include <utility>

#include "absl/base/call_once.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/layout/layout_impl.h"

namespace dsd {
namespace {

int64_t NumElementsOf(const std::vector<LocalBox>& boxes) {
  int64_t count = 0;
  for (const LocalBox& part : boxes) count += part.box.num_elements();
  return count;
}

// Boxes of one holder are disjoint, so counting is comparing.
bool SameElements(const Layout& a, const Layout& b, Holder holder) {
  const std::vector<LocalBox> boxes = a.BoxesOf(holder);
  const int64_t count = NumElementsOf(boxes);
  if (count != NumElementsOf(b.BoxesOf(holder))) return false;
  int64_t common = 0;
  for (const LocalBox& part : boxes) {
    b.ForEachCell(part.box, [&](const Cell& cell) {
      if (cell.holders.Contains(holder)) common += cell.box.num_elements();
    });
  }
  return common == count;
}

}  // namespace

absl::Status CheckShape(const Dims& shape) {
  if (!CheckedProduct(shape).has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor of shape ", DimsToString(shape),
        ": extents must be >= 0 and their product at most 2^63 - 1"));
  }
  return absl::OkStatus();
}

Layout Layout::Anywhere(Dims shape) {
  return WholeBoxes(std::move(shape), {kAnyHolder});
}

Layout::Kind Layout::kind() const { return impl_->kind; }

const Dims& Layout::shape() const { return impl_->shape; }

const Box& Layout::whole() const { return impl_->whole; }

std::vector<LocalBox> Layout::BoxesOf(Holder holder) const {
  return impl_->BoxesOf(holder);
}

std::optional<Dims> Layout::LocalShape(Holder holder) const {
  return impl_->LocalShape(holder);
}

void Layout::ForEachCell(const Box& query,
                         absl::FunctionRef<void(const Cell&)> visit,
                         int64_t* operations) const {
  int64_t uncounted = 0;
  const std::optional<Box> inside = Intersect(query, impl_->whole);
  if (!inside.has_value()) return;
  impl_->ForEachCell(*inside, visit,
                     operations != nullptr ? *operations : uncounted);
}

int64_t Layout::NumUncovered() const { return impl_->NumUncovered(); }

bool Layout::HasAnyHolder() const { return impl_->HasAnyHolder(); }

std::optional<std::pair<Holder, Holder>> Layout::HolderBounds() const {
  return impl_->HolderBounds();
}

void Layout::ForEachHolder(absl::FunctionRef<void(Holder)> visit) const {
  impl_->ForEachHolder(visit);
}

const Digest& Layout::symbols() const {
  absl::call_once(impl_->symbols_once, [this] {
    DigestBuilder digest;
    digest.Add(static_cast<int64_t>(kind()));
    digest.Add(absl::MakeConstSpan(shape()));
    impl_->AddTo(digest);
    impl_->symbols = digest.Finish();
  });
  return impl_->symbols;
}

bool Layout::SameGeometry(const Layout& a, const Layout& b) {
  if (a.impl_ == b.impl_) return true;
  if (a.shape() != b.shape()) return false;
  if (a.symbols() == b.symbols()) return true;
  absl::flat_hash_set<Holder> holders;
  const auto insert = [&holders](Holder holder) { holders.insert(holder); };
  a.ForEachHolder(insert);
  b.ForEachHolder(insert);
  return std::all_of(holders.begin(), holders.end(),
                     [&](Holder holder) { return SameElements(a, b, holder); });
}

absl::StatusOr<Layout> Layout::MapHolders(
    absl::FunctionRef<Holder(Holder)> map) const {
  return impl_->MapHolders(map);
}

std::string Layout::ToString() const {
  return absl::StrCat(DimsToString(shape()), " ", impl_->ToString());
}

}  // namespace dsd
