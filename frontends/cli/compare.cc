// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <variant>
#include <vector>

#include "absl/numeric/int128.h"
#include "absl/strings/str_cat.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/cli/element.h"
#include "dsd/frontends/cli/value_text.h"

namespace dsd::cli {
namespace {

using Complex = std::complex<double>;

constexpr size_t kMaxValueText = 60;

bool IsNan(double value) { return std::isnan(value); }
bool IsNan(Complex value) {
  return std::isnan(value.real()) || std::isnan(value.imag());
}
template <class V>
bool IsNan(V) {
  static_assert(std::is_integral_v<V>);
  return false;
}

// |a - b|; of integers without overflow and without rounding them first.
template <class A, class B>
double Distance(A a, B b) {
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B>) {
    const absl::int128 distance = absl::int128(a) - absl::int128(b);
    return static_cast<double>(distance < 0 ? -distance : distance);
  } else {
    return std::abs(Complex(a) - Complex(b));
  }
}
double Distance(double a, double b) { return std::fabs(a - b); }

template <class A, class B>
bool Equal(A a, B b) {
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B>) {
    return Distance(a, b) == 0;
  } else {
    return Complex(a) == Complex(b);
  }
}

template <class V>
double Magnitude(V value) {
  if constexpr (element::kIsComplex<V>) {
    return std::abs(value);
  } else {
    return std::fabs(static_cast<double>(value));
  }
}

template <class A, class B>
bool IsWithin(const Tolerance& tolerance, A a, B b) {
  if (Equal(a, b)) return true;
  if (IsNan(a) || IsNan(b)) return IsNan(a) && IsNan(b);
  const double distance = Distance(a, b);
  // An infinite limit would hold for an infinite distance too.
  return std::isfinite(distance) &&
         distance <= tolerance.atol.value_or(0) +
                         tolerance.rtol.value_or(0) * Magnitude(b);
}

}  // namespace

// Counts a pair that differs.
template <class A, class B>
void Comparison::Count(A a, B b) {
  ++difference_.elements;
  const double distance = Distance(a, b);
  if (!std::isfinite(distance)) return;
  difference_.max_abs = std::max(difference_.max_abs.value_or(0), distance);
  const double magnitude = Magnitude(b);
  if (magnitude == 0) return;
  difference_.max_rel =
      std::max(difference_.max_rel.value_or(0), distance / magnitude);
}

// `at`: in the box, row-major.
void Comparison::KeepFirst(const Box& box, int64_t at, const Number& a,
                           const Number& b) {
  Dims point = box.lo;
  for (int d = box.ndim() - 1; d >= 0; --d) {
    point[d] += at % box.extent(d);
    at /= box.extent(d);
  }
  const int64_t flat = FlatIndex(shape_, point);
  if (flat >= first_flat_) return;
  first_flat_ = flat;
  difference_.first = point;
  difference_.a = a;
  difference_.b = b;
}

template <class E>
void Comparison::AddAs(const Box& box, int64_t begin,
                       absl::Span<const std::byte> a,
                       absl::Span<const std::byte> b) {
  const int64_t count = static_cast<int64_t>(a.size()) / E::kSize;
  bool is_first = true;
  for (int64_t i = 0; i < count; ++i) {
    const std::byte* const at_a = a.data() + i * E::kSize;
    const std::byte* const at_b = b.data() + i * E::kSize;
    if (std::memcmp(at_a, at_b, E::kSize) == 0) continue;
    const auto value_a = E::Load(at_a);
    const auto value_b = E::Load(at_b);
    if (!tolerance_.exact() && IsWithin(tolerance_, value_a, value_b)) continue;
    Count(value_a, value_b);
    if (is_first) KeepFirst(box, begin + i, value_a, value_b);
    is_first = false;
  }
}

void Comparison::AddMixed(const Box& box, int64_t begin,
                          absl::Span<const std::byte> a,
                          absl::Span<const std::byte> b) {
  const int64_t size_a = ItemSize(a_), size_b = ItemSize(b_);
  const int64_t count = static_cast<int64_t>(a.size()) / size_a;
  const auto load = [](DType dtype, const std::byte* at) {
    return VisitElementType(
        dtype, [at](auto type) { return Number(decltype(type)::Load(at)); });
  };
  bool is_first = true;
  for (int64_t i = 0; i < count; ++i) {
    const Number value_a = load(a_, a.data() + i * size_a);
    const Number value_b = load(b_, b.data() + i * size_b);
    const bool same = std::visit(
        [this](auto x, auto y) {
          if (IsWithin(tolerance_, x, y)) return true;
          Count(x, y);
          return false;
        },
        value_a, value_b);
    if (same) continue;
    if (is_first) KeepFirst(box, begin + i, value_a, value_b);
    is_first = false;
  }
}

void Comparison::Add(const Box& box, int64_t begin,
                     absl::Span<const std::byte> a,
                     absl::Span<const std::byte> b) {
  if (a_ != b_) return AddMixed(box, begin, a, b);
  // Equal bits are the same with tolerances too.
  if (std::memcmp(a.data(), b.data(), a.size()) == 0) return;
  VisitElementType(a_,
                   [&](auto type) { AddAs<decltype(type)>(box, begin, a, b); });
}

namespace {

class ObjectComparison {
 public:
  explicit ObjectComparison(const Tolerance& tolerance)
      : tolerance_(tolerance) {}

  ObjectVerdict Compare(const Object& a, const Object& b) {
    if (const auto* dict = a.get_if<Object::Dict>()) {
      const auto* other = b.get_if<Object::Dict>();
      return other != nullptr ? CompareDicts(*dict, *other) : Differ(a, b);
    }
    const auto* tuple_a = a.get_if<Object::Tuple>();
    const auto* tuple_b = b.get_if<Object::Tuple>();
    if (tuple_a != nullptr && tuple_b != nullptr) {
      return CompareLists(tuple_a->items, tuple_b->items);
    }
    const auto* list_a = a.get_if<Object::List>();
    const auto* list_b = b.get_if<Object::List>();
    if (list_a != nullptr && list_b != nullptr) {
      return CompareLists(*list_a, *list_b);
    }
    const auto* number_a = a.get_if<double>();
    const auto* number_b = b.get_if<double>();
    if (number_a != nullptr && number_b != nullptr) {
      return IsWithin(tolerance_, *number_a, *number_b) ? ObjectVerdict::kSame
                                                        : Differ(a, b);
    }
    if (!(a == b)) return Differ(a, b);
    const auto* opaque = a.get_if<Opaque>();
    return opaque == nullptr || dcp::IsTorchDType(opaque->type_name)
               ? ObjectVerdict::kSame
               : ObjectVerdict::kUnknown;
  }

  // The way to the difference, from the outside, and the values.
  std::string where() const {
    std::string out;
    for (const PathSegment& segment : path_) {
      if (const auto* text = std::get_if<std::string>(&segment)) {
        absl::StrAppend(&out, "['", Printable(*text), "']");
      } else {
        absl::StrAppend(&out, "[", std::get<int64_t>(segment), "]");
      }
    }
    return absl::StrCat(out, out.empty() ? "" : ": ", values_);
  }

 private:
  ObjectVerdict Differ(const Object& a, const Object& b) {
    std::string text_a = ValueText(a, kMaxValueText);
    std::string text_b = ValueText(b, kMaxValueText);
    if (text_a == text_b) {  // of other kinds, or cut
      text_a = absl::StrCat(Printable(a.kind_name()), " ", text_a);
      text_b = absl::StrCat(Printable(b.kind_name()), " ", text_b);
    }
    values_ = absl::StrCat(text_a, ", in B ", text_b);
    return ObjectVerdict::kDifferent;
  }

  ObjectVerdict CompareDicts(const Object::Dict& a, const Object::Dict& b) {
    ObjectVerdict verdict = ObjectVerdict::kSame;
    for (const auto& [has, lacks, text] :
         {std::make_tuple(&a, &b, "missing in B"),
          std::make_tuple(&b, &a, "only in B")}) {
      for (size_t i = 0; i < has->size(); ++i) {
        if (lacks->Find(has->key(i)) != nullptr) continue;
        path_.push_back(has->key(i));
        values_ = text;
        return ObjectVerdict::kDifferent;
      }
    }
    for (size_t i = 0; i < a.size(); ++i) {
      const ObjectVerdict item =
          Descend(a.key(i), a.value(i), *b.Find(a.key(i)));
      if (item == ObjectVerdict::kDifferent) return item;
      if (item == ObjectVerdict::kUnknown) verdict = item;
    }
    return verdict;
  }

  ObjectVerdict CompareLists(const Object::List& a, const Object::List& b) {
    if (a.size() != b.size()) {
      values_ = absl::StrCat(a.size(), " items, in B ", b.size());
      return ObjectVerdict::kDifferent;
    }
    ObjectVerdict verdict = ObjectVerdict::kSame;
    for (size_t i = 0; i < a.size(); ++i) {
      const ObjectVerdict item = Descend(static_cast<int64_t>(i), a[i], b[i]);
      if (item == ObjectVerdict::kDifferent) return item;
      if (item == ObjectVerdict::kUnknown) verdict = item;
    }
    return verdict;
  }

  ObjectVerdict Descend(const PathSegment& segment, const Object& a,
                        const Object& b) {
    path_.push_back(segment);
    const ObjectVerdict verdict = Compare(a, b);
    if (verdict != ObjectVerdict::kDifferent) path_.pop_back();
    return verdict;
  }

  const Tolerance& tolerance_;
  Path path_;
  std::string values_;
};

}  // namespace

ObjectVerdict CompareObjects(const Object& a, const Object& b,
                             const Tolerance& tolerance, std::string* where) {
  ObjectComparison comparison(tolerance);
  const ObjectVerdict verdict = comparison.Compare(a, b);
  if (verdict == ObjectVerdict::kDifferent) *where = comparison.where();
  return verdict;
}

}  // namespace dsd::cli
