// SPDX-License-Identifier: Apache-2.0
//
// What each kind of Layout answers. Only core/layout includes this.

#ifndef DSD_CORE_LAYOUT_LAYOUT_IMPL_H_
#define DSD_CORE_LAYOUT_LAYOUT_IMPL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/call_once.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/layout.h"

namespace dsd {

// Functions are as those of Layout with the same name.
struct Layout::Impl {
  Impl(Kind kind, Dims tensor_shape)
      : kind(kind), shape(std::move(tensor_shape)), whole(Box::Whole(shape)) {}
  virtual ~Impl() = default;

  virtual std::vector<LocalBox> BoxesOf(Holder holder) const = 0;
  virtual std::optional<Dims> LocalShape(Holder holder) const = 0;
  virtual void ForEachCell(const Box& query,
                           absl::FunctionRef<void(const Cell&)> visit,
                           int64_t& operations) const = 0;
  virtual int64_t NumUncovered() const = 0;
  virtual bool HasAnyHolder() const = 0;
  virtual std::optional<std::pair<Holder, Holder>> HolderBounds() const = 0;
  virtual void ForEachHolder(absl::FunctionRef<void(Holder)> visit) const = 0;
  virtual void AddTo(DigestBuilder& digest) const = 0;
  virtual absl::StatusOr<Layout> MapHolders(
      absl::FunctionRef<Holder(Holder)> map) const = 0;
  // Without the shape.
  virtual std::string ToString() const = 0;

  const Kind kind;
  const Dims shape;
  const Box whole;
  mutable absl::once_flag symbols_once;
  mutable Digest symbols;
};

// InvalidArgument for a negative extent or more than 2^63 - 1 elements.
absl::Status CheckShape(const Dims& shape);

}  // namespace dsd

#endif  // DSD_CORE_LAYOUT_LAYOUT_IMPL_H_
