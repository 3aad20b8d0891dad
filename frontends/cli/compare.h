// SPDX-License-Identifier: Apache-2.0
//
// Whether two tensors, or two objects, have the same values, and where not.

#ifndef DSD_FRONTENDS_CLI_COMPARE_H_
#define DSD_FRONTENDS_CLI_COMPARE_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/cli/statistics.h"

namespace dsd::cli {

// Without tolerances numbers of one type are the same if their bits are. With
// them, and of two types, a and b are the same if they are equal, both NaN, or
// |a - b| <= atol + rtol * |b|.
struct Tolerance {
  std::optional<double> rtol;
  std::optional<double> atol;
  bool exact() const { return !rtol.has_value() && !atol.has_value(); }
};

struct Difference {
  int64_t elements = 0;  // that differ
  // Over those that differ, and are finite on both sides. The relative one is
  // |a - b| / |b|, and leaves out b = 0.
  std::optional<double> max_abs;
  std::optional<double> max_rel;
  // The first in row-major order, and its values.
  Dims first;
  Number a;
  Number b;
};

// Compares two tensors of one shape, part by part, in any order.
// Thread-compatible.
class Comparison {
 public:
  Comparison(DType a, DType b, absl::Span<const int64_t> shape,
             const Tolerance& tolerance)
      : a_(a),
        b_(b),
        shape_(shape.begin(), shape.end()),
        tolerance_(tolerance) {}

  // Elements [begin, begin + n) of `box`, back to back.
  void Add(const Box& box, int64_t begin, absl::Span<const std::byte> a,
           absl::Span<const std::byte> b);

  const Difference& difference() const { return difference_; }

 private:
  template <class E>
  void AddAs(const Box& box, int64_t begin, absl::Span<const std::byte> a,
             absl::Span<const std::byte> b);
  void AddMixed(const Box& box, int64_t begin, absl::Span<const std::byte> a,
                absl::Span<const std::byte> b);
  template <class A, class B>
  void Count(A a, B b);
  void KeepFirst(const Box& box, int64_t at, const Number& a, const Number& b);

  const DType a_;
  const DType b_;
  const Dims shape_;
  const Tolerance tolerance_;
  Difference difference_;
  int64_t first_flat_ = std::numeric_limits<int64_t>::max();
};

enum class ObjectVerdict {
  kSame,
  kDifferent,
  kUnknown,  // objects of a class whose content is not decoded
};

// Where two objects differ first: "['betas'][0]: 0.9, in B 0.95", in `where`.
// Floats in them are compared by `tolerance`; without one NaN equals NaN.
ObjectVerdict CompareObjects(const Object& a, const Object& b,
                             const Tolerance& tolerance, std::string* where);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_COMPARE_H_
