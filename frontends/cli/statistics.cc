// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/value/value_text.h"
#include "dsd/frontends/cli/element.h"

namespace dsd::cli {
namespace {

using Complex = std::complex<double>;

// Numbers that are looked at together: they and their copies stay in the cache.
constexpr int64_t kBlock = 2048;
// Sums that a processor can add to at the same time.
constexpr int kLanes = 8;

// The sum of of(x) over the numbers, in few roundings.
template <class Sum, class Of>
Sum SumOf(absl::Span<const double> numbers, Of of) {
  Sum lanes[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= numbers.size(); i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += of(numbers[i + lane]);
    }
  }
  for (; i < numbers.size(); ++i) lanes[0] += of(numbers[i]);
  Sum sum = 0;
  for (const Sum& lane : lanes) sum += lane;
  return sum;
}

nlohmann::ordered_json RealJson(double value) {
  if (std::isfinite(value)) return value;
  return FloatText(value);
}

}  // namespace

std::string NumberText(const Number& number) {
  if (const auto* flag = std::get_if<bool>(&number)) {
    return *flag ? "True" : "False";
  }
  if (const auto* value = std::get_if<double>(&number)) {
    return FloatText(*value);
  }
  if (const auto* value = std::get_if<Complex>(&number)) {
    const std::string imaginary = FloatText(value->imag());
    return absl::StrCat(FloatText(value->real()),
                        imaginary[0] == '-' ? "" : "+", imaginary, "j");
  }
  if (const auto* value = std::get_if<int64_t>(&number)) {
    return absl::StrCat(*value);
  }
  return absl::StrCat(std::get<uint64_t>(number));
}

nlohmann::ordered_json NumberJson(const Number& number) {
  if (const auto* value = std::get_if<double>(&number)) return RealJson(*value);
  if (const auto* value = std::get_if<Complex>(&number)) {
    return {RealJson(value->real()), RealJson(value->imag())};
  }
  if (const auto* flag = std::get_if<bool>(&number)) return *flag;
  if (const auto* value = std::get_if<int64_t>(&number)) return *value;
  return std::get<uint64_t>(number);
}

void StatisticsBuilder::Moments::Merge(int64_t count, const Moments& other,
                                       int64_t other_count) {
  const long double all = static_cast<long double>(count) + other_count;
  const long double distance = other.mean - mean;
  squares += other.squares + distance * distance * count * (other_count / all);
  mean += distance * (other_count / all);
}

StatisticsBuilder::Moments StatisticsBuilder::MomentsOf(
    absl::Span<const double> numbers) {
  // Wide sums are slow, and needed only where a block's squares may overflow.
  constexpr double kSafe = 1e150;
  Moments moments;
  if (numbers.empty()) return moments;
  const bool safe = std::all_of(numbers.begin(), numbers.end(),
                                [](double x) { return std::fabs(x) < kSafe; });
  const auto identity = [](double x) { return x; };
  if (safe) {
    const double mean = SumOf<double>(numbers, identity) / numbers.size();
    moments.mean = mean;
    moments.squares = SumOf<double>(
        numbers, [mean](double x) { return (x - mean) * (x - mean); });
  } else {
    const long double mean =
        SumOf<long double>(numbers, identity) / numbers.size();
    moments.mean = mean;
    moments.squares = SumOf<long double>(
        numbers,
        [mean](double x) -> long double { return (x - mean) * (x - mean); });
  }
  return moments;
}

template <class V>
void StatisticsBuilder::AddFinite(absl::Span<const V> numbers) {
  if (numbers.empty()) return;
  const int64_t count = static_cast<int64_t>(numbers.size());
  double parts[kBlock];
  if constexpr (element::kIsComplex<V>) {
    for (int64_t i = 0; i < count; ++i) parts[i] = numbers[i].imag();
    imaginary_.Merge(finite_, MomentsOf({parts, numbers.size()}), count);
    for (int64_t i = 0; i < count; ++i) parts[i] = numbers[i].real();
  } else {
    for (int64_t i = 0; i < count; ++i) {
      parts[i] = static_cast<double>(numbers[i]);
    }
  }
  real_.Merge(finite_, MomentsOf({parts, numbers.size()}), count);
  finite_ += count;

  const auto keep = [&](auto low, auto high) {
    using Kept = decltype(low);
    if (!min_.has_value() || low < std::get<Kept>(*min_)) min_ = low;
    if (!max_.has_value() || high > std::get<Kept>(*max_)) max_ = high;
  };
  if constexpr (element::kIsComplex<V>) {
    for (int64_t i = 0; i < count; ++i) parts[i] = std::abs(numbers[i]);
    const auto [low, high] = std::minmax_element(parts, parts + count);
    keep(*low, *high);
  } else {
    V low = numbers[0], high = numbers[0];
    for (const V number : numbers) {
      low = std::min(low, number);
      high = std::max(high, number);
    }
    keep(low, high);
  }
}

template <class E>
void StatisticsBuilder::AddAs(absl::Span<const std::byte> elements) {
  using V = typename E::Value;
  V block[kBlock];
  const int64_t total = static_cast<int64_t>(elements.size()) / E::kSize;
  count_ += total;
  for (int64_t begin = 0; begin < total; begin += kBlock) {
    const int64_t end = std::min(total, begin + kBlock);
    size_t finite = 0;
    for (int64_t i = begin; i < end; ++i) {
      const V value = E::Load(elements.data() + i * E::kSize);
      zeros_ += value == V();
      if constexpr (std::is_same_v<V, double>) {
        // One comparison for the usual number.
        if (std::fabs(value) <= std::numeric_limits<double>::max()) {
          block[finite++] = value;
        } else {
          ++(std::isnan(value) ? nan_ : inf_);
        }
      } else if constexpr (element::kIsComplex<V>) {
        if (std::isfinite(value.real()) && std::isfinite(value.imag())) {
          block[finite++] = value;
        } else {
          ++(std::isnan(value.real()) || std::isnan(value.imag()) ? nan_
                                                                  : inf_);
        }
      } else {
        block[finite++] = value;
      }
    }
    AddFinite(absl::Span<const V>(block, finite));
  }
}

void StatisticsBuilder::Add(absl::Span<const std::byte> elements) {
  VisitElementType(dtype_, [&](auto type) {
    using E = decltype(type);
    if constexpr (!std::is_same_v<E, element::Float4Pair>) {
      AddAs<E>(elements);
    }
  });
  if (dtype_ != DType::kFloat4E2M1FNX2) return;
  // As the numbers that they are, one byte each.
  constexpr size_t kBytes = 4096;
  std::byte numbers[2 * kBytes];
  for (size_t at = 0; at < elements.size(); at += kBytes) {
    const auto piece = elements.subspan(at, kBytes);
    for (size_t i = 0; i < piece.size(); ++i) {
      numbers[2 * i] = piece[i];
      numbers[2 * i + 1] = piece[i] >> 4;
    }
    AddAs<element::Converted<uint8_t, &Float4E2M1FNToFloat>>(
        {numbers, 2 * piece.size()});
  }
}

Statistics StatisticsBuilder::Finish() const {
  Statistics out;
  out.count = count_;
  out.zeros = zeros_;
  out.nan = nan_;
  out.inf = inf_;
  if (finite_ == 0) return out;
  out.min = min_;
  out.max = max_;
  const bool is_complex = VisitElementType(dtype_, [](auto type) {
    return element::kIsComplex<typename decltype(type)::Value> &&
           !std::is_same_v<decltype(type), element::Float4Pair>;
  });
  const double mean = static_cast<double>(real_.mean);
  out.mean = is_complex
                 ? Number(Complex(mean, static_cast<double>(imaginary_.mean)))
                 : Number(mean);
  out.std = static_cast<double>(
      std::sqrt((real_.squares + imaginary_.squares) / finite_));
  return out;
}

}  // namespace dsd::cli
