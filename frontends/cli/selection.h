// SPDX-License-Identifier: Apache-2.0
//
// What a person names on the command line: a key, or a slice of a tensor.

#ifndef DSD_FRONTENDS_CLI_SELECTION_H_
#define DSD_FRONTENDS_CLI_SELECTION_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/layout/box.h"
#include "dsd/frontends/checkpoint/checkpoint.h"

namespace dsd::cli {

// A part of a tensor, as Python's indexing gives it.
struct Slice {
  Box box;
  std::vector<int> dims;  // that remain: those without an index
  Dims shape() const;     // of what remains

  static Slice Whole(absl::Span<const int64_t> shape);
};

// "0:3, :, -1, ..." of a tensor of `shape`: numbers and ranges per dimension,
// negative ones from the end; dimensions that are not named are whole. Ranges
// are clipped, as Python's. InvalidArgument for what is no slice, for steps,
// and for a number outside the tensor.
absl::StatusOr<Slice> ParseSlice(absl::string_view text,
                                 absl::Span<const int64_t> shape);

// Of tensors, objects, and tensors that cannot be read.
std::vector<absl::string_view> AllKeys(
    const checkpoint::Checkpoint& checkpoint);

struct Selection {
  std::string key;
  bool is_tensor = false;
  size_t index = 0;  // in catalog() or objects()
  Slice slice;       // of a tensor
};

// A key, or a key and a slice in brackets: "weight[0:3,:]". InvalidArgument if
// there is no such key, with the nearest ones, and as ParseSlice; Unimplemented
// for a tensor that cannot be read.
absl::StatusOr<Selection> ParseSelection(
    absl::string_view text, const checkpoint::Checkpoint& checkpoint);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_SELECTION_H_
