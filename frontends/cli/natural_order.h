// SPDX-License-Identifier: Apache-2.0
//
// Names of layers in the order in which people count.

#ifndef DSD_FRONTENDS_CLI_NATURAL_ORDER_H_
#define DSD_FRONTENDS_CLI_NATURAL_ORDER_H_

#include <cstdint>
#include <string>
#include <tuple>

#include "absl/strings/numbers.h"

namespace dsd::cli {

// Numbers by value and before other texts: "9", "10", "9a".
struct NaturalOrder {
  bool operator()(const std::string& a, const std::string& b) const {
    return Rank(a) < Rank(b);
  }

 private:
  static std::tuple<bool, int64_t, const std::string&> Rank(
      const std::string& text) {
    int64_t number = 0;
    const bool is_number = absl::SimpleAtoi(text, &number);
    return {!is_number, is_number ? number : 0, text};
  }
};

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_NATURAL_ORDER_H_
