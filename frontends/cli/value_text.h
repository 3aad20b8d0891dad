// SPDX-License-Identifier: Apache-2.0
//
// Stored objects as text and as JSON.

#ifndef DSD_FRONTENDS_CLI_VALUE_TEXT_H_
#define DSD_FRONTENDS_CLI_VALUE_TEXT_H_

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"
#include "dsd/core/value/value.h"
#include "nlohmann/json.hpp"

namespace dsd::cli {

// As Python shows it, cut after about `max_size` characters.
std::string ValueText(const Object& value, size_t max_size);

// None is null, tuples are lists, bytes are {"bytes": hexadecimal}, objects of
// unknown classes {"class": name}; infinities and NaN are text.
nlohmann::ordered_json ValueJson(const Object& value);

// Text that a terminal shows as it is: without control characters, and with
// bytes that are not UTF-8 escaped.
std::string Printable(absl::string_view text);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_VALUE_TEXT_H_
