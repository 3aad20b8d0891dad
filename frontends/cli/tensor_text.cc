// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/tensor_text.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/element.h"
#include "dsd/frontends/cli/element_stream.h"
#include "dsd/frontends/cli/statistics.h"

namespace dsd::cli {
namespace {

// torch's defaults.
constexpr int64_t kEdge = 3;
constexpr int64_t kLineWidth = 80;
constexpr int64_t kMaxSummary = int64_t{1} << 20;

// How a column of numbers is written, found from all of them.
class RealFormat {
 public:
  void Observe(double value) {
    if (!std::isfinite(value) || value == 0) return;
    const double magnitude = std::fabs(value);
    Range& range = value < 0 ? negative_ : positive_;
    range.min = std::min(range.min, magnitude);
    range.max = std::max(range.max, magnitude);
    is_integral_ = is_integral_ && value == std::ceil(value);
  }

  void Finish() {
    const double min = std::min(negative_.min, positive_.min);
    const double max = std::max(negative_.max, positive_.max);
    if (max == 0) return;
    is_scientific_ =
        max / min > 1000 || max > 1e8 || (!is_integral_ && min < 1e-4);
    // The longest texts are at the ends.
    for (const double value :
         {-negative_.min, -negative_.max, positive_.min, positive_.max}) {
      if (value == 0 || std::isinf(value)) continue;
      width_ = std::max(width_, Unpadded(value).size());
    }
  }

  std::string Text(double value) const {
    const std::string text = Unpadded(value);
    return text.size() >= width_
               ? text
               : std::string(width_ - text.size(), ' ') + text;
  }

  int64_t width() const { return static_cast<int64_t>(width_); }

 private:
  struct Range {
    double min = std::numeric_limits<double>::infinity();
    double max = 0;
  };

  std::string Unpadded(double value) const {
    if (std::isnan(value)) return "nan";
    if (is_scientific_) return absl::StrFormat("%.4e", value);
    if (!is_integral_) return absl::StrFormat("%.4f", value);
    return absl::StrCat(absl::StrFormat("%.0f", value),
                        std::isinf(value) ? "" : ".");
  }

  Range negative_;
  Range positive_;
  bool is_integral_ = true;
  bool is_scientific_ = false;
  size_t width_ = 1;
};

class WholeFormat {
 public:
  template <class V>
  void Observe(V value) {
    width_ = std::max(width_, NumberText(value).size());
  }
  void Finish() {}
  template <class V>
  std::string Text(V value) const {
    const std::string text = NumberText(value);
    return std::string(width_ - text.size(), ' ') + text;
  }
  int64_t width() const { return static_cast<int64_t>(width_); }

 private:
  size_t width_ = 1;
};

class ComplexFormat {
 public:
  explicit ComplexFormat(bool is_pair) : is_pair_(is_pair) {}
  void Observe(std::complex<double> value) {
    real_.Observe(value.real());
    imaginary_.Observe(value.imag());
  }
  void Finish() {
    real_.Finish();
    imaginary_.Finish();
  }
  std::string Text(std::complex<double> value) const {
    const std::string second = imaginary_.Text(value.imag());
    if (is_pair_) return absl::StrCat(real_.Text(value.real()), "|", second);
    const std::string imaginary =
        absl::StrCat(absl::StripLeadingAsciiWhitespace(second), "j");
    return absl::StrCat(real_.Text(value.real()),
                        imaginary[0] == '-' ? "" : "+", imaginary);
  }
  int64_t width() const { return real_.width() + imaginary_.width() + 1; }

 private:
  const bool is_pair_;  // of a packed type
  RealFormat real_;
  RealFormat imaginary_;
};

template <class E>
auto MakeFormat() {
  if constexpr (std::is_same_v<typename E::Value, double>) {
    return RealFormat();
  } else if constexpr (element::kIsComplex<typename E::Value>) {
    return ComplexFormat(std::is_same_v<E, element::Float4Pair>);
  } else {
    return WholeFormat();
  }
}

// Counts what stands on the last line.
class Writer {
 public:
  explicit Writer(std::ostream& out) : out_(out) {}
  void Write(absl::string_view text) {
    out_ << text;
    const size_t line = text.rfind('\n');
    column_ = line == absl::string_view::npos ? column_ + text.size()
                                              : text.size() - line - 1;
  }
  size_t column() const { return column_; }

 private:
  std::ostream& out_;
  size_t column_ = 0;
};

template <class E, class Format>
class Printer {
 public:
  Printer(ElementStream& stream, const Format& format, int ndim, Writer& out)
      : stream_(stream), format_(format), ndim_(ndim), out_(out) {}

  absl::Status Print(int dim, int64_t indent) {
    if (ndim_ == 0) return PrintElement();
    out_.Write("[");
    const bool innermost = dim + 1 == ndim_;
    const int64_t per_line =
        std::max<int64_t>(1, (kLineWidth - indent) / (format_.width() + 2));
    int64_t items = 0;
    const auto separate = [&] {
      const int64_t item = items++;
      if (item == 0) return;
      if (innermost && item % per_line != 0) return out_.Write(", ");
      out_.Write(
          absl::StrCat(",", std::string(innermost ? 1 : ndim_ - dim - 1, '\n'),
                       std::string(indent + 1, ' ')));
    };
    bool first = true;
    for (const auto& [begin, end] : stream_.ranges(dim)) {
      if (!first) {
        separate();
        out_.Write(innermost ? " ..." : "...");
      }
      first = false;
      for (int64_t i = begin; i < end; ++i) {
        separate();
        DSD_RETURN_IF_ERROR(innermost ? PrintElement()
                                      : Print(dim + 1, indent + 1));
      }
    }
    out_.Write("]");
    return absl::OkStatus();
  }

 private:
  absl::Status PrintElement() {
    DSD_ASSIGN_OR_RETURN(const std::byte* const element, stream_.Next());
    out_.Write(format_.Text(E::Load(element)));
    return absl::OkStatus();
  }

  ElementStream& stream_;
  const Format& format_;
  const int ndim_;
  Writer& out_;
};

// The types that torch does not mention.
bool IsDefault(DType dtype, bool empty) {
  if (empty) return dtype == DType::kFloat32;
  return dtype == DType::kFloat32 || dtype == DType::kInt64 ||
         dtype == DType::kBool || dtype == DType::kComplex64;
}

template <class E>
absl::Status NestedJson(ElementStream& stream, int dim, int ndim,
                        nlohmann::ordered_json* out) {
  if (dim == ndim) {
    DSD_ASSIGN_OR_RETURN(const std::byte* const element, stream.Next());
    *out = NumberJson(Number(E::Load(element)));
    return absl::OkStatus();
  }
  *out = nlohmann::ordered_json::array();
  for (int64_t i = 0; i < stream.ranges(dim)[0].second; ++i) {
    nlohmann::ordered_json item;
    DSD_RETURN_IF_ERROR(NestedJson<E>(stream, dim + 1, ndim, &item));
    out->push_back(std::move(item));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteTensor(Endpoint& endpoint, size_t tensor, const Slice& slice,
                         bool full, std::ostream& out) {
  constexpr absl::string_view kPrefix = "tensor(";
  const DType dtype = endpoint.catalog()[tensor].dtype;
  const int64_t count = slice.box.num_elements();
  const Dims shape = slice.shape();
  const int ndim = static_cast<int>(shape.size());
  const int64_t edge = !full && count > kPrintThreshold ? kEdge : 0;
  Writer writer(out);
  std::vector<std::string> suffixes;
  writer.Write(kPrefix);
  if (count == 0) {
    writer.Write("[]");
    if (ndim != 1) {
      suffixes.push_back(
          absl::StrCat("size=(", absl::StrJoin(shape, ", "), ")"));
    }
  } else {
    ElementStream first(endpoint, tensor, slice, edge);
    if (edge > 0 && first.count() > kMaxSummary) {
      return absl::InvalidArgumentError(absl::StrCat(
          "even the summary of shape ", DimsToString(shape), " has ",
          first.count(), " elements; choose a slice, such as [0, ...]"));
    }
    DSD_RETURN_IF_ERROR(VisitElementType(dtype, [&](auto type) -> absl::Status {
      using E = decltype(type);
      auto format = MakeFormat<E>();
      for (int64_t i = first.count(); i > 0; --i) {
        DSD_ASSIGN_OR_RETURN(const std::byte* const element, first.Next());
        format.Observe(E::Load(element));
      }
      format.Finish();
      ElementStream second(endpoint, tensor, slice, edge);
      return Printer<E, decltype(format)>(second, format, ndim, writer)
          .Print(0, kPrefix.size());
    }));
  }
  if (!IsDefault(dtype, count == 0)) {
    suffixes.push_back(absl::StrCat("dtype=torch.", DTypeName(dtype)));
  }
  for (const std::string& suffix : suffixes) {
    const bool fits = writer.column() + suffix.size() + 4 <= kLineWidth;
    writer.Write(absl::StrCat(
        fits ? ", " : absl::StrCat(",\n", std::string(kPrefix.size(), ' ')),
        suffix));
  }
  writer.Write(")\n");
  return absl::OkStatus();
}

absl::StatusOr<nlohmann::ordered_json> TensorJson(Endpoint& endpoint,
                                                  size_t tensor,
                                                  const Slice& slice) {
  ElementStream stream(endpoint, tensor, slice, 0);
  nlohmann::ordered_json out;
  DSD_RETURN_IF_ERROR(VisitElementType(
      endpoint.catalog()[tensor].dtype, [&](auto type) -> absl::Status {
        return NestedJson<decltype(type)>(
            stream, 0, static_cast<int>(slice.dims.size()), &out);
      }));
  return out;
}

}  // namespace dsd::cli
