// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/element_stream.h"

#include <algorithm>

#include "dsd/core/base/status_macros.h"

namespace dsd::cli {

std::vector<Box> StoredBoxes(const Layout& layout, const Box& box) {
  std::vector<Box> boxes;
  layout.ForEachCell(box,
                     [&boxes](const Cell& cell) { boxes.push_back(cell.box); });
  return boxes;
}

absl::StatusOr<int64_t> ReadStored(
    Endpoint& endpoint, size_t tensor, const Box& box,
    absl::FunctionRef<absl::Status(const Piece&)> visit) {
  const TensorSpec& spec = endpoint.catalog()[tensor];
  const int64_t item_size = ItemSize(spec.dtype);
  const int64_t step = kPieceBytes / item_size;
  std::vector<std::byte> buffer;
  int64_t found = 0;
  for (const Box& stored : StoredBoxes(spec.layout, box)) {
    const int64_t count = stored.num_elements();
    for (int64_t begin = 0; begin < count; begin += step) {
      const int64_t end = std::min(begin + step, count);
      const size_t bytes = (end - begin) * item_size;
      if (buffer.size() < bytes) buffer.resize(bytes);
      const auto piece = absl::MakeSpan(buffer).first(bytes);
      DSD_RETURN_IF_ERROR(
          endpoint.Read(tensor, stored, begin, end, spec.dtype, piece));
      DSD_RETURN_IF_ERROR(visit(Piece{stored, begin, end, piece}));
    }
    found += count;
  }
  return found;
}

ElementStream::ElementStream(Endpoint& endpoint, size_t tensor,
                             const Slice& slice, int64_t edge)
    : endpoint_(endpoint),
      tensor_(tensor),
      slice_(slice),
      item_size_(ItemSize(endpoint.catalog()[tensor].dtype)) {
  for (const int64_t extent : slice.shape()) {
    if (edge > 0 && extent > 2 * edge) {
      ranges_.push_back({{0, edge}, {extent - edge, extent}});
      is_cut_ = true;
      count_ *= 2 * edge;
    } else {
      ranges_.push_back({{0, extent}});
      count_ *= extent;
    }
  }
  if (is_cut_) outer_.resize(ranges_.size() - 1, 0);
}

absl::StatusOr<const std::byte*> ElementStream::Next() {
  if (at_ == buffer_.size()) {
    DSD_RETURN_IF_ERROR(Fill());
    at_ = 0;
  }
  const std::byte* const element = buffer_.data() + at_;
  at_ += item_size_;
  return element;
}

absl::Status ElementStream::Fill() {
  const DType dtype = endpoint_.catalog()[tensor_].dtype;
  const int64_t step = kPieceBytes / item_size_;
  if (!is_cut_) {
    const int64_t end = std::min(done_ + step, count_);
    buffer_.resize((end - done_) * item_size_);
    DSD_RETURN_IF_ERROR(endpoint_.Read(tensor_, slice_.box, done_, end, dtype,
                                       absl::MakeSpan(buffer_)));
    done_ = end;
    return absl::OkStatus();
  }
  // A run of the innermost dimension.
  const int last = static_cast<int>(ranges_.size()) - 1;
  Box box = slice_.box;
  const auto narrow = [&](int dim, int64_t lo, int64_t hi) {
    const int d = slice_.dims[dim];
    box.hi[d] = box.lo[d] + hi;
    box.lo[d] += lo;
  };
  for (int dim = 0; dim < last; ++dim) {
    narrow(dim, outer_[dim], outer_[dim] + 1);
  }
  const Range& range = ranges_[last][inner_range_];
  const int64_t begin = range.first + inner_done_;
  const int64_t end = std::min(range.second, begin + step);
  narrow(last, begin, end);
  buffer_.resize((end - begin) * item_size_);
  DSD_RETURN_IF_ERROR(endpoint_.Read(tensor_, box, 0, end - begin, dtype,
                                     absl::MakeSpan(buffer_)));
  inner_done_ += end - begin;
  if (end < range.second) return absl::OkStatus();
  inner_done_ = 0;
  if (++inner_range_ < ranges_[last].size()) return absl::OkStatus();
  inner_range_ = 0;
  for (int dim = last - 1; dim >= 0; --dim) {
    int64_t& at = outer_[dim];
    const std::vector<Range>& of_dim = ranges_[dim];
    if (++at == of_dim[0].second && of_dim.size() > 1) at = of_dim[1].first;
    if (at < of_dim.back().second) break;
    at = 0;
  }
  return absl::OkStatus();
}

}  // namespace dsd::cli
