// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/safetensors/header.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/little_endian.h"
#include "dsd/frontends/checkpoint/safetensors/json_events.h"
#include "nlohmann/json.hpp"

namespace dsd::safetensors {
namespace {

constexpr char kMetadata[] = "__metadata__";
constexpr int64_t kLengthBytes = 8;
constexpr int64_t kAlignment = 64;
constexpr size_t kMaxDims = 64;
// Holds the header of most files.
constexpr int64_t kFirstReadBytes = 64 << 10;

struct FormatDType {
  absl::string_view name;
  int bits;
  std::optional<DType> dtype;
};

constexpr FormatDType kDTypes[] = {
    {"BOOL", 8, DType::kBool},
    {"U8", 8, DType::kUInt8},
    {"I8", 8, DType::kInt8},
    {"I16", 16, DType::kInt16},
    {"U16", 16, DType::kUInt16},
    {"F16", 16, DType::kFloat16},
    {"BF16", 16, DType::kBFloat16},
    {"I32", 32, DType::kInt32},
    {"U32", 32, DType::kUInt32},
    {"F32", 32, DType::kFloat32},
    {"C64", 64, DType::kComplex64},
    {"F64", 64, DType::kFloat64},
    {"I64", 64, DType::kInt64},
    {"U64", 64, DType::kUInt64},
    {"F8_E5M2", 8, DType::kFloat8E5M2},
    {"F8_E4M3", 8, DType::kFloat8E4M3FN},
    {"F8_E8M0", 8, DType::kFloat8E8M0FNU},
    {"F8_E4M3FNUZ", 8, DType::kFloat8E4M3FNUZ},
    {"F8_E5M2FNUZ", 8, DType::kFloat8E5M2FNUZ},
    {"F4", 4, DType::kFloat4E2M1FNX2},
    {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt},
};

const FormatDType* FindDType(absl::string_view name) {
  for (const FormatDType& dtype : kDTypes) {
    if (dtype.name == name) return &dtype;
  }
  return nullptr;
}

std::string Quoted(absl::string_view name) {
  return absl::StrCat("\"", absl::CHexEscape(name.substr(0, 256)), "\"");
}

// The format's table of tensors: {name: {"dtype", "shape", "data_offsets"}}.
class HeaderReader : public JsonEvents {
 public:
  explicit HeaderReader(Header* header) : header_(*header) {}

 protected:
  bool OnOpen(bool is_object) override {
    if (depth() == 0) {
      return is_object || Fail("the header is no JSON object");
    }
    if (depth() == 1) {
      if (!is_object) return NotATensor("no object");
      if (key(0) == kMetadata) return true;
      tensor_ = HeaderTensor();
      tensor_.name = key(0);
      offsets_.clear();
      has_dtype_ = has_shape_ = false;
      return true;
    }
    if (key(0) == kMetadata) return NoText();
    if (depth() > 2) return !IsKnown() || NotATensor("nested in a field");
    field_ = key(1) == "dtype"          ? Field::kDType
             : key(1) == "shape"        ? Field::kShape
             : key(1) == "data_offsets" ? Field::kOffsets
                                        : Field::kOther;
    if (field_ == Field::kShape) has_shape_ = true;
    const bool takes_list =
        !is_object && (field_ == Field::kShape || field_ == Field::kOffsets);
    return takes_list || field_ == Field::kOther ||
           NotATensor(absl::StrCat("no such value: ", key(1)));
  }

  bool OnClose() override {
    if (depth() != 1 || key(0) == kMetadata) return true;
    if (!has_dtype_ || !has_shape_ || offsets_.size() != 2) {
      return NotATensor(
          "it needs dtype, shape and data_offsets of two numbers");
    }
    tensor_.begin_bytes = offsets_[0];
    tensor_.end_bytes = offsets_[1];
    return Finish();
  }

  bool OnText(std::string& value) override {
    if (depth() < 2)
      return depth() == 0 ? Fail("no object") : NotATensor("text");
    if (key(0) == kMetadata) {
      header_.metadata.emplace_back(key(1), std::move(value));
      return true;
    }
    if (depth() == 2 && key(1) == "dtype") {
      has_dtype_ = true;
      tensor_.dtype_name = std::move(value);
      return true;
    }
    return !IsKnown() || NotATensor(absl::StrCat("text in ", key(1)));
  }

  bool OnNumber(uint64_t value) override {
    if (depth() < 2)
      return depth() == 0 ? Fail("no object") : NotATensor("number");
    if (key(0) == kMetadata) return NoText();
    if (!IsKnown()) return true;
    if (depth() != 3 || key(1) == "dtype") {
      return NotATensor(absl::StrCat("a number for ", key(1)));
    }
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return NotATensor(absl::StrCat(value, " is out of range"));
    }
    if (field_ == Field::kShape) {
      if (tensor_.shape.size() >= kMaxDims) {
        return NotATensor(absl::StrCat("more than ", kMaxDims, " dimensions"));
      }
      tensor_.shape.push_back(static_cast<int64_t>(value));
    } else {
      if (offsets_.size() >= 2) return NotATensor("more than two data_offsets");
      offsets_.push_back(static_cast<int64_t>(value));
    }
    return true;
  }

  bool OnOther() override {
    if (depth() < 2) {
      return depth() == 0 ? Fail("no object") : NotATensor("no object");
    }
    if (key(0) == kMetadata) return NoText();
    return !IsKnown() ||
           NotATensor(absl::StrCat("a value of ", key(1),
                                   " is neither text nor a number >= 0"));
  }

 private:
  enum class Field { kDType, kShape, kOffsets, kOther };

  bool IsKnown() const {
    return key(1) == "dtype" || key(1) == "shape" || key(1) == "data_offsets";
  }
  bool NotATensor(absl::string_view what) {
    return Fail(absl::StrCat("tensor ", Quoted(key(0)), ": ", what));
  }
  bool NoText() {
    return Fail(absl::StrCat(kMetadata, ": ", Quoted(key(1)), " is no text"));
  }

  // Checks the tensor by itself.
  bool Finish() {
    const FormatDType* const dtype = FindDType(tensor_.dtype_name);
    if (dtype == nullptr) {
      // A later version's: nothing can be said about its size.
      if (tensor_.begin_bytes > tensor_.end_bytes) {
        return NotATensor("data_offsets go backwards");
      }
      header_.tensors.push_back(std::move(tensor_));
      return true;
    }
    const auto elements = CheckedProduct(tensor_.shape);
    const auto bits = elements.has_value() ? CheckedMul(*elements, dtype->bits)
                                           : std::nullopt;
    if (!bits.has_value() || *bits % 8 != 0) {
      return NotATensor(absl::StrCat("shape ", DimsToString(tensor_.shape),
                                     " of ", dtype->name,
                                     " is no whole number of bytes"));
    }
    if (tensor_.begin_bytes > tensor_.end_bytes ||
        tensor_.end_bytes - tensor_.begin_bytes != *bits / 8) {
      return NotATensor(absl::StrCat(
          "shape ", DimsToString(tensor_.shape), " of ", dtype->name, " takes ",
          *bits / 8, " bytes, data_offsets are [", tensor_.begin_bytes, ", ",
          tensor_.end_bytes, "]"));
    }
    tensor_.dtype = dtype->dtype;
    if (dtype->bits == 4) {
      // Pairs along the last dimension.
      if (tensor_.shape.empty() || tensor_.shape.back() % 2 != 0) {
        tensor_.dtype = std::nullopt;
      } else {
        tensor_.shape.back() /= 2;
      }
    }
    header_.tensors.push_back(std::move(tensor_));
    return true;
  }

  Header& header_;
  HeaderTensor tensor_;
  std::vector<int64_t> offsets_;
  Field field_ = Field::kOther;
  bool has_dtype_ = false;
  bool has_shape_ = false;
};

}  // namespace

absl::string_view NameOfDType(DType dtype) {
  for (const FormatDType& known : kDTypes) {
    if (known.dtype == dtype) return known.name;
  }
  return "";
}

absl::StatusOr<Header> ParseHeader(absl::string_view json, int64_t data_bytes) {
  const auto bad = [](absl::string_view what) {
    return absl::DataLossError(absl::StrCat("safetensors header: ", what));
  };
  if (json.empty() || json[0] != '{') return bad("it does not begin with '{'");
  Header header;
  const absl::Status read = HeaderReader(&header).Read(json);
  if (!read.ok()) return bad(read.message());
  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const HeaderTensor& a, const HeaderTensor& b) {
                     return std::make_pair(a.begin_bytes, a.end_bytes) <
                            std::make_pair(b.begin_bytes, b.end_bytes);
                   });
  int64_t end = 0;
  for (const HeaderTensor& tensor : header.tensors) {
    if (tensor.begin_bytes != end) {
      return bad(absl::StrCat(
          "tensor ", Quoted(tensor.name), " begins at byte ",
          tensor.begin_bytes, " of the data, expected ", end,
          tensor.begin_bytes > end ? " (a hole)" : " (it overlaps another)"));
    }
    end = tensor.end_bytes;
  }
  if (end != data_bytes) {
    return bad(absl::StrCat("the tensors take ", end, " bytes, the file has ",
                            data_bytes, " after its header",
                            end > data_bytes ? " (truncated?)" : ""));
  }
  return header;
}

absl::StatusOr<Header> ReadHeader(ReadableFile& file) {
  const int64_t file_bytes = file.size_bytes();
  if (file_bytes < kLengthBytes) {
    return absl::DataLossError(absl::StrCat(
        "safetensors header: the file has ", file_bytes,
        " bytes, expected at least ", kLengthBytes, " (truncated?)"));
  }
  const auto read = [&file](int64_t at, char* out, int64_t bytes) {
    return file.ReadAt(
        at, absl::MakeSpan(reinterpret_cast<std::byte*>(out), bytes));
  };
  std::string head(std::min(kFirstReadBytes, file_bytes), '\0');
  DSD_RETURN_IF_ERROR(read(0, head.data(), head.size()));
  const uint64_t length = dcp::LoadLittleEndian<uint64_t>(head.data());
  if (length > static_cast<uint64_t>(file_bytes - kLengthBytes)) {
    return absl::DataLossError(absl::StrCat(
        "safetensors header: it is to have ", length, " bytes, the file has ",
        file_bytes - kLengthBytes, " after the length (truncated?)"));
  }
  if (length > static_cast<uint64_t>(kMaxHeaderBytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("safetensors header: ", length,
                     " bytes, the limit of the format is ", kMaxHeaderBytes));
  }
  const int64_t end = kLengthBytes + static_cast<int64_t>(length);
  const int64_t have = static_cast<int64_t>(head.size());
  if (end > have) {
    head.resize(end);
    DSD_RETURN_IF_ERROR(read(have, head.data() + have, end - have));
  }
  DSD_ASSIGN_OR_RETURN(
      Header header,
      ParseHeader(absl::string_view(head).substr(kLengthBytes, length),
                  file_bytes - end));
  header.data_at = end;
  return header;
}

absl::StatusOr<std::string> EncodeHeader(const Header& header) {
  std::string out(kLengthBytes, '\0');
  out += '{';
  const auto text = [](absl::string_view value) {
    return nlohmann::json(std::string(value))
        .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  };
  const auto separate = [&out] {
    if (out.back() != '{') out += ',';
  };
  if (!header.metadata.empty()) {
    absl::StrAppend(&out, "\"", kMetadata, "\":{");
    for (const auto& [key, value] : header.metadata) {
      separate();
      absl::StrAppend(&out, text(key), ":", text(value));
    }
    out += '}';
  }
  for (const HeaderTensor& tensor : header.tensors) {
    separate();
    absl::StrAppend(&out, text(tensor.name), ":{\"dtype\":\"",
                    NameOfDType(*tensor.dtype), "\",\"shape\":[");
    Dims shape = tensor.shape;
    if (*tensor.dtype == DType::kFloat4E2M1FNX2) shape.back() *= 2;
    for (size_t d = 0; d < shape.size(); ++d) {
      absl::StrAppend(&out, d == 0 ? "" : ",", shape[d]);
    }
    absl::StrAppend(&out, "],\"data_offsets\":[", tensor.begin_bytes, ",",
                    tensor.end_bytes, "]}");
  }
  out += '}';
  out.append((kAlignment - out.size() % kAlignment) % kAlignment, ' ');
  const int64_t length = static_cast<int64_t>(out.size()) - kLengthBytes;
  if (length > kMaxHeaderBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "safetensors header: ", header.tensors.size(), " tensors take ", length,
        " bytes, the limit of the format is ", kMaxHeaderBytes,
        "; write several files"));
  }
  std::string length_bytes;
  dcp::AppendLittleEndian<uint64_t>(&length_bytes, length);
  out.replace(0, kLengthBytes, length_bytes);
  return out;
}

}  // namespace dsd::safetensors
