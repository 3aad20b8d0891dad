// SPDX-License-Identifier: Apache-2.0
//
// Elements of stored tensors in bounded memory.

#ifndef DSD_FRONTENDS_CLI_ELEMENT_STREAM_H_
#define DSD_FRONTENDS_CLI_ELEMENT_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/frontends/cli/selection.h"

namespace dsd::cli {

// Bytes that are read at once.
inline constexpr int64_t kPieceBytes = int64_t{1} << 20;

// The boxes in which `box` is stored.
std::vector<Box> StoredBoxes(const Layout& layout, const Box& box);

// Elements [begin, end) of `box`, counted row-major over it.
struct Piece {
  const Box& box;
  int64_t begin;
  int64_t end;
  absl::Span<const std::byte> elements;
};

// Reads the elements of `box` that are stored, each once, in any order. Returns
// how many there are. Errors: of the endpoint and of `visit`.
absl::StatusOr<int64_t> ReadStored(
    Endpoint& endpoint, size_t tensor, const Box& box,
    absl::FunctionRef<absl::Status(const Piece&)> visit);

// Some elements of a slice in row-major order: all of them, or for each
// dimension only the first and the last few.
class ElementStream {
 public:
  // With `edge` > 0 the first and last `edge` positions of a dimension that has
  // more than twice that many. Borrows all.
  ElementStream(Endpoint& endpoint, size_t tensor, const Slice& slice,
                int64_t edge);

  // Positions of remaining dimension `dim`, as ranges.
  using Range = std::pair<int64_t, int64_t>;
  const std::vector<Range>& ranges(int dim) const { return ranges_[dim]; }
  int64_t count() const { return count_; }  // of elements

  // The next element, valid until the next call; not to be called more than
  // count() times. Errors: of the endpoint.
  absl::StatusOr<const std::byte*> Next();

 private:
  absl::Status Fill();

  Endpoint& endpoint_;
  const size_t tensor_;
  const Slice& slice_;
  const int64_t item_size_;
  std::vector<std::vector<Range>> ranges_;
  int64_t count_ = 1;
  bool is_cut_ = false;

  std::vector<std::byte> buffer_;
  size_t at_ = 0;     // in buffer_, bytes
  int64_t done_ = 0;  // elements that were read into buffer_
  // Cut streams: the positions of the next run.
  std::vector<int64_t> outer_;
  size_t inner_range_ = 0;
  int64_t inner_done_ = 0;
};

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_ELEMENT_STREAM_H_
