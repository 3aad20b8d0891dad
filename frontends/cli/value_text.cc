// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/value_text.h"

#include <cmath>

#include "absl/strings/escaping.h"
#include "absl/strings/str_replace.h"
#include "dsd/core/value/value_text.h"

namespace dsd::cli {
std::string Printable(absl::string_view text) {
  // Escapes control characters and keeps UTF-8 that is whole.
  std::string escaped = absl::Utf8SafeCEscape(text);
  const bool valid =
      nlohmann::json(std::string(text))
          .dump(-1, ' ', false, nlohmann::json::error_handler_t::ignore)
          .size() >= text.size() + 2;
  if (!valid) escaped = absl::CHexEscape(text);
  return absl::StrReplaceAll(escaped, {{"\\\"", "\""}, {"\\'", "'"}});
}

std::string ValueText(const Object& value, size_t max_size) {
  return dsd::ValueText(value, {max_size, &Printable});
}

nlohmann::ordered_json ValueJson(const Object& value) {
  if (value.is<None>()) return nullptr;
  if (const bool* flag = value.get_if<bool>()) return *flag;
  if (const int64_t* number = value.get_if<int64_t>()) return *number;
  if (const double* number = value.get_if<double>()) {
    if (!std::isfinite(*number)) return FloatText(*number);
    return *number;
  }
  if (const std::string* text = value.get_if<std::string>()) return *text;
  if (const Bytes* bytes = value.get_if<Bytes>()) {
    return {{"bytes", absl::BytesToHexString(bytes->data)}};
  }
  // JSON has neither.
  if (const auto* both = value.get_if<Complex>()) return ComplexText(*both);
  if (const auto* wide = value.get_if<WideInt>()) return WideIntText(*wide);
  const auto* list = value.get_if<Object::List>();
  if (const auto* tuple = value.get_if<Object::Tuple>()) list = &tuple->items;
  if (const auto* set = value.get_if<Object::Set>()) list = &set->items;
  if (list != nullptr) {
    auto out = nlohmann::ordered_json::array();
    for (const Object& item : *list) out.push_back(ValueJson(item));
    return out;
  }
  // As pairs: keys of JSON are text.
  if (const auto* map = value.get_if<Object::Map>()) {
    auto out = nlohmann::ordered_json::array();
    for (size_t i = 0; i < map->keys.size(); ++i) {
      out.push_back({ValueJson(map->keys[i]), ValueJson(map->values[i])});
    }
    return out;
  }
  if (const auto* dict = value.get_if<Object::Dict>()) {
    auto out = nlohmann::ordered_json::object();
    for (size_t i = 0; i < dict->size(); ++i) {
      out[dict->key_text(i)] = ValueJson(dict->value(i));
    }
    return out;
  }
  return {{"class", std::string(value.kind_name())}};
}

}  // namespace dsd::cli
