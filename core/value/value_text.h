// SPDX-License-Identifier: Apache-2.0
//
// Values as text, written as Python writes them.

#ifndef DSD_CORE_VALUE_VALUE_TEXT_H_
#define DSD_CORE_VALUE_VALUE_TEXT_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <variant>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "dsd/core/value/value.h"

namespace dsd {

// The shortest decimal that reads back as `value`, as Python's repr(): "0.1",
// "1e-08", "3.0", "nan", "-inf".
std::string FloatText(double value);

// As Python's repr(): "(1+2j)", "2.5j".
std::string ComplexText(Complex value);

// In decimal.
std::string WideIntText(const WideInt& value);

struct ValueTextOptions {
  // The text is cut, at a character, after about so many bytes.
  size_t max_size = std::numeric_limits<size_t>::max();
  // For text and for names of classes.
  std::string (*escape)(absl::string_view) = &absl::Utf8SafeCEscape;
};

namespace internal {

std::string CutText(std::string text, size_t max_size);

template <class TensorT>
class ValueTextWriter {
 public:
  using Value = BasicValue<TensorT>;

  ValueTextWriter(absl::FunctionRef<std::string(const TensorT&)> tensor_text,
                  const ValueTextOptions& options)
      : tensor_text_(tensor_text), options_(options) {}

  void Append(const Value& value) {
    if (value.template is<None>()) {
      out_.append("None");
    } else if (const auto* flag = value.template get_if<bool>()) {
      out_.append(*flag ? "True" : "False");
    } else if (const auto* number = value.template get_if<int64_t>()) {
      absl::StrAppend(&out_, *number);
    } else if (const auto* number = value.template get_if<double>()) {
      out_.append(FloatText(*number));
    } else if (const auto* text = value.template get_if<std::string>()) {
      AppendQuoted(*text);
    } else if (const auto* bytes = value.template get_if<Bytes>()) {
      absl::StrAppend(&out_, "<", bytes->data.size(), " bytes>");
    } else if (const auto* both = value.template get_if<Complex>()) {
      out_.append(ComplexText(*both));
    } else if (const auto* wide = value.template get_if<WideInt>()) {
      out_.append(WideIntText(*wide));
    } else if (const auto* tensor = value.template get_if<TensorT>()) {
      out_.append(tensor_text_(*tensor));
    } else if (const auto* list =
                   value.template get_if<typename Value::List>()) {
      out_.append("[");
      AppendItems(*list);
      out_.append("]");
    } else if (const auto* tuple =
                   value.template get_if<typename Value::Tuple>()) {
      out_.append("(");
      AppendItems(tuple->items);
      out_.append(tuple->items.size() == 1 ? ",)" : ")");
    } else if (const auto* dict =
                   value.template get_if<typename Value::Dict>()) {
      AppendDict(*dict);
    } else if (const auto* set = value.template get_if<typename Value::Set>()) {
      AppendSet(*set);
    } else if (const auto* map = value.template get_if<typename Value::Map>()) {
      AppendMap(*map);
    } else {
      absl::StrAppend(&out_, "<", options_.escape(value.kind_name()), ">");
    }
  }

  void AppendDict(const typename Value::Dict& dict) {
    out_.append("{");
    for (size_t i = 0; i < dict.size() && !IsFull(); ++i) {
      if (i > 0) out_.append(", ");
      if (const auto* text = std::get_if<std::string>(&dict.key(i))) {
        AppendQuoted(*text);
      } else {
        absl::StrAppend(&out_, std::get<int64_t>(dict.key(i)));
      }
      out_.append(": ");
      Append(dict.value(i));
    }
    out_.append("}");
  }

  void AppendMap(const typename Value::Map& map) {
    out_.append("{");
    for (size_t i = 0; i < map.keys.size() && !IsFull(); ++i) {
      if (i > 0) out_.append(", ");
      Append(map.keys[i]);
      out_.append(": ");
      Append(map.values[i]);
    }
    out_.append("}");
  }

  // Python has no braces for an empty one.
  void AppendSet(const typename Value::Set& set) {
    const bool has_braces = !set.items.empty();
    const bool is_call = set.is_frozen || !has_braces;
    if (is_call) out_.append(set.is_frozen ? "frozenset(" : "set(");
    if (has_braces) {
      out_.append("{");
      AppendItems(set.items);
      out_.append("}");
    }
    if (is_call) out_.append(")");
  }

  std::string Finish() && {
    return CutText(std::move(out_), options_.max_size);
  }

 private:
  bool IsFull() const { return out_.size() > options_.max_size; }

  void AppendQuoted(absl::string_view text) {
    // Long before the end of text that is cut anyway.
    if (text.size() > options_.max_size) {
      text = text.substr(0, options_.max_size + 1);
    }
    absl::StrAppend(&out_, "'", options_.escape(text), "'");
  }

  void AppendItems(const std::vector<Value>& items) {
    for (size_t i = 0; i < items.size() && !IsFull(); ++i) {
      if (i > 0) out_.append(", ");
      Append(items[i]);
    }
  }

  absl::FunctionRef<std::string(const TensorT&)> tensor_text_;
  const ValueTextOptions& options_;
  std::string out_;
};

}  // namespace internal

// `tensor_text` writes a tensor.
template <class TensorT>
std::string ValueText(
    const BasicValue<TensorT>& value,
    absl::FunctionRef<std::string(const TensorT&)> tensor_text,
    const ValueTextOptions& options = {}) {
  internal::ValueTextWriter<TensorT> writer(tensor_text, options);
  writer.Append(value);
  return std::move(writer).Finish();
}

inline std::string ValueText(const Object& value,
                             const ValueTextOptions& options = {}) {
  return ValueText<HostTensor>(
      value,
      [](const HostTensor& tensor) {
        return absl::StrCat("<tensor ", DTypeName(tensor.dtype()), " [",
                            absl::StrJoin(tensor.shape(), ", "), "]>");
      },
      options);
}

}  // namespace dsd

#endif  // DSD_CORE_VALUE_VALUE_TEXT_H_
