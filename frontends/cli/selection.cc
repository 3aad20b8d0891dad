// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/selection.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/near_keys.h"
#include "dsd/frontends/cli/value_text.h"

namespace dsd::cli {
namespace {

using checkpoint::Checkpoint;

absl::StatusOr<int64_t> ParseIndex(absl::string_view text) {
  int64_t value = 0;
  if (!absl::SimpleAtoi(text, &value)) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", Printable(text), "\" is no number"));
  }
  return value;
}

// The end of a range that is left open is `open`.
absl::StatusOr<int64_t> ParseBound(absl::string_view text, int64_t extent,
                                   int64_t open) {
  if (text.empty()) return open;
  DSD_ASSIGN_OR_RETURN(const int64_t value, ParseIndex(text));
  // Not below -extent, so that nothing overflows.
  return std::clamp<int64_t>(
      value < 0 ? std::max(value, -extent) + extent : value, 0, extent);
}

absl::Status ParseDim(absl::string_view text, int64_t extent, int64_t* lo,
                      int64_t* hi, bool* is_index) {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ':');
  if (parts.size() == 1) {
    DSD_ASSIGN_OR_RETURN(const int64_t index, ParseIndex(parts[0]));
    if (index < -extent || index >= extent) {
      return absl::InvalidArgumentError(
          absl::StrCat("index ", index, " is outside a dimension of ", extent));
    }
    *lo = index < 0 ? index + extent : index;
    *hi = *lo + 1;
    *is_index = true;
    return absl::OkStatus();
  }
  const bool has_step = parts.size() == 3 &&
                        !absl::StripAsciiWhitespace(parts[2]).empty() &&
                        absl::StripAsciiWhitespace(parts[2]) != "1";
  if (parts.size() > 3 || has_step) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", Printable(text), "\": a range is begin:end, without a step"));
  }
  DSD_ASSIGN_OR_RETURN(
      *lo, ParseBound(absl::StripAsciiWhitespace(parts[0]), extent, 0));
  DSD_ASSIGN_OR_RETURN(
      *hi, ParseBound(absl::StripAsciiWhitespace(parts[1]), extent, extent));
  *hi = std::max(*lo, *hi);
  return absl::OkStatus();
}

// nullopt if there is no such key.
std::optional<Selection> FindKey(absl::string_view key,
                                 const Checkpoint& checkpoint) {
  Selection out;
  out.key = std::string(key);
  if (const auto tensor = checkpoint.catalog().Find(key)) {
    out.is_tensor = true;
    out.index = *tensor;
    out.slice = Slice::Whole(checkpoint.catalog()[*tensor].shape());
    return out;
  }
  const auto& objects = checkpoint.objects();
  for (size_t i = 0; i < objects.size(); ++i) {
    if (objects[i].key != key) continue;
    out.index = i;
    return out;
  }
  return std::nullopt;
}

}  // namespace

std::vector<absl::string_view> AllKeys(const Checkpoint& checkpoint) {
  std::vector<absl::string_view> keys;
  for (const TensorSpec& spec : checkpoint.catalog().tensors()) {
    keys.push_back(spec.fqn);
  }
  for (const auto& object : checkpoint.objects()) keys.push_back(object.key);
  for (const auto& [key, dtype] : checkpoint.unreadable()) keys.push_back(key);
  return keys;
}

Dims Slice::shape() const {
  Dims out;
  for (const int dim : dims) out.push_back(box.extent(dim));
  return out;
}

Slice Slice::Whole(absl::Span<const int64_t> shape) {
  Slice out;
  out.box = Box::Whole(shape);
  for (int d = 0; d < out.box.ndim(); ++d) out.dims.push_back(d);
  return out;
}

absl::StatusOr<Slice> ParseSlice(absl::string_view text,
                                 absl::Span<const int64_t> shape) {
  Slice out;
  out.box = Box::Whole(shape);
  std::vector<absl::string_view> parts;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    parts.push_back(absl::StripAsciiWhitespace(part));
  }
  // A comma may end the list; nothing at all is everything.
  if (parts.back().empty()) parts.pop_back();
  const int ndim = static_cast<int>(shape.size());
  const int ellipses =
      static_cast<int>(std::count(parts.begin(), parts.end(), "..."));
  const int named = static_cast<int>(parts.size()) - ellipses;
  if (ellipses > 1) {
    return absl::InvalidArgumentError("\"...\" stands twice");
  }
  if (named > ndim) {
    return absl::InvalidArgumentError(absl::StrCat(
        named, " dimensions, but the tensor has shape ", DimsToString(shape)));
  }
  if (ellipses == 0) parts.push_back("...");
  int dim = 0;
  for (const absl::string_view part : parts) {
    if (part == "...") {
      for (int skipped = ndim - named; skipped > 0; --skipped) {
        out.dims.push_back(dim++);
      }
      continue;
    }
    bool is_index = false;
    DSD_RETURN_IF_ERROR(ParseDim(part, shape[dim], &out.box.lo[dim],
                                 &out.box.hi[dim], &is_index));
    if (!is_index) out.dims.push_back(dim);
    ++dim;
  }
  return out;
}

absl::StatusOr<Selection> ParseSelection(absl::string_view text,
                                         const Checkpoint& checkpoint) {
  if (std::optional<Selection> found = FindKey(text, checkpoint)) {
    return *std::move(found);
  }
  absl::string_view key = text;
  const size_t bracket = text.rfind('[');
  if (absl::EndsWith(text, "]") && bracket != absl::string_view::npos) {
    key = text.substr(0, bracket);
    std::optional<Selection> found = FindKey(key, checkpoint);
    if (found.has_value() && !found->is_tensor) {
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", Printable(key), "\" is not a tensor and has no slices"));
    }
    if (found.has_value()) {
      absl::StatusOr<Slice> slice =
          ParseSlice(text.substr(bracket + 1, text.size() - bracket - 2),
                     checkpoint.catalog()[found->index].shape());
      DSD_RETURN_IF_ERROR(slice.status()) << "\"" << Printable(text) << "\"";
      found->slice = *std::move(slice);
      return *std::move(found);
    }
  }
  for (const auto& [name, dtype] : checkpoint.unreadable()) {
    if (name != key) continue;
    return absl::UnimplementedError(
        absl::StrCat("\"", Printable(key), "\" has dtype ", Printable(dtype),
                     ", which is not supported"));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "the checkpoint at \"", Printable(checkpoint.path()), "\" has no key \"",
      Printable(key), "\"", DidYouMean(AllKeys(checkpoint), key)));
}

}  // namespace dsd::cli
