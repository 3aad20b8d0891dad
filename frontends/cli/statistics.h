// SPDX-License-Identifier: Apache-2.0
//
// What can be said of a tensor's numbers in one pass over them, in any order.

#ifndef DSD_FRONTENDS_CLI_STATISTICS_H_
#define DSD_FRONTENDS_CLI_STATISTICS_H_

#include <complex>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "nlohmann/json.hpp"

namespace dsd::cli {

// A number as a person and as JSON read it. Infinities and NaN are text in
// JSON, complex numbers lists of two.
using Number =
    std::variant<bool, int64_t, uint64_t, double, std::complex<double>>;
std::string NumberText(const Number& number);
nlohmann::ordered_json NumberJson(const Number& number);

struct Statistics {
  int64_t count = 0;  // of numbers: two per element of float4_e2m1fn_x2
  int64_t zeros = 0;
  int64_t nan = 0;  // complex: a part is NaN
  int64_t inf = 0;  // complex: a part is infinite, and none is NaN
  // Of the finite numbers, nullopt if there are none. Of complex numbers the
  // least and the greatest magnitude.
  std::optional<Number> min;
  std::optional<Number> max;
  std::optional<Number> mean;
  // Of the population: the root of the mean squared distance from the mean.
  std::optional<Number> std;
};

// Thread-compatible.
class StatisticsBuilder {
 public:
  explicit StatisticsBuilder(DType dtype) : dtype_(dtype) {}

  // Elements back to back. In any order; each once.
  void Add(absl::Span<const std::byte> elements);

  Statistics Finish() const;

 private:
  // Sums of one real component over the finite numbers. The wide type keeps
  // squares of the largest float64.
  struct Moments {
    long double mean = 0;
    long double squares = 0;  // of distances from the mean
    void Merge(int64_t count, const Moments& other, int64_t other_count);
  };

  template <class E>
  void AddAs(absl::Span<const std::byte> elements);
  template <class V>
  void AddFinite(absl::Span<const V> numbers);
  static Moments MomentsOf(absl::Span<const double> numbers);

  DType dtype_;
  int64_t count_ = 0, zeros_ = 0, nan_ = 0, inf_ = 0, finite_ = 0;
  std::optional<Number> min_, max_;
  Moments real_, imaginary_;
};

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_STATISTICS_H_
