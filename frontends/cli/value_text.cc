// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/value_text.h"

#include <cmath>
#include <variant>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace dsd::cli {
namespace {

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  // The shortest form that reads back, as Python's.
  return nlohmann::json(value).dump();
}

void Append(const Object& value, size_t max_size, std::string* out);

void AppendKey(const PathSegment& key, std::string* out) {
  if (const auto* text = std::get_if<std::string>(&key)) {
    absl::StrAppend(out, "'", Printable(*text), "'");
  } else {
    absl::StrAppend(out, std::get<int64_t>(key));
  }
}

void AppendItems(const std::vector<Object>& items, size_t max_size,
                 std::string* out) {
  for (size_t i = 0; i < items.size() && out->size() <= max_size; ++i) {
    if (i > 0) out->append(", ");
    Append(items[i], max_size, out);
  }
}

void Append(const Object& value, size_t max_size, std::string* out) {
  if (value.is<None>()) {
    out->append("None");
  } else if (const bool* flag = value.get_if<bool>()) {
    out->append(*flag ? "True" : "False");
  } else if (const int64_t* number = value.get_if<int64_t>()) {
    absl::StrAppend(out, *number);
  } else if (const double* number = value.get_if<double>()) {
    out->append(FloatText(*number));
  } else if (const std::string* text = value.get_if<std::string>()) {
    absl::StrAppend(out, "'",
                    Printable(absl::string_view(*text).substr(0, max_size + 1)),
                    "'");
  } else if (const Bytes* bytes = value.get_if<Bytes>()) {
    absl::StrAppend(out, "<", bytes->data.size(), " bytes>");
  } else if (const auto* list = value.get_if<Object::List>()) {
    out->append("[");
    AppendItems(*list, max_size, out);
    out->append("]");
  } else if (const auto* tuple = value.get_if<Object::Tuple>()) {
    out->append("(");
    AppendItems(tuple->items, max_size, out);
    out->append(tuple->items.size() == 1 ? ",)" : ")");
  } else if (const auto* dict = value.get_if<Object::Dict>()) {
    out->append("{");
    for (size_t i = 0; i < dict->size() && out->size() <= max_size; ++i) {
      if (i > 0) out->append(", ");
      AppendKey(dict->key(i), out);
      out->append(": ");
      Append(dict->value(i), max_size, out);
    }
    out->append("}");
  } else {
    absl::StrAppend(out, "<", Printable(value.kind_name()), ">");
  }
}

}  // namespace

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
  std::string out;
  Append(value, max_size, &out);
  if (out.size() <= max_size) return out;
  size_t end = max_size;
  while (end > 0 && (static_cast<unsigned char>(out[end]) & 0xC0) == 0x80) {
    --end;
  }
  return out.substr(0, end) + "...";
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
  const auto* list = value.get_if<Object::List>();
  if (const auto* tuple = value.get_if<Object::Tuple>()) list = &tuple->items;
  if (list != nullptr) {
    auto out = nlohmann::ordered_json::array();
    for (const Object& item : *list) out.push_back(ValueJson(item));
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
