// SPDX-License-Identifier: Apache-2.0
//
// The header of a safetensors file: eight bytes of length, JSON that names
// tensors and where their elements lie, then the elements, row-major and
// little-endian, back to back.

#ifndef DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_HEADER_H_
#define DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_HEADER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/env.h"
#include "dsd/core/layout/box.h"

namespace dsd::safetensors {

// Of the format.
inline constexpr int64_t kMaxHeaderBytes = 100'000'000;

struct HeaderTensor {
  std::string name;
  std::string dtype_name;      // as in the file: "BF16"
  std::optional<DType> dtype;  // nullopt: one that is not known here
  // In elements of `dtype`: of two four-bit numbers (F4) the last extent is
  // half of that in the file.
  Dims shape;
  // Of the elements, from the end of the header.
  int64_t begin_bytes = 0;
  int64_t end_bytes = 0;
};

struct Header {
  std::vector<HeaderTensor> tensors;  // by place, without a gap
  // `__metadata__`, in the order of the file.
  std::vector<std::pair<std::string, std::string>> metadata;
  int64_t data_at = 0;  // in the file
};

// The header that begins `json`, in front of `data_bytes` bytes of elements.
// Every rule of the format is checked: extents and offsets against each other
// and `data_bytes`, no hole, no overlap, no name twice, UTF-8. Fields of a
// tensor that are not known are passed over. DataLoss names the tensor, what
// was found and expected.
absl::StatusOr<Header> ParseHeader(absl::string_view json, int64_t data_bytes);

// The same of a file; also ResourceExhausted for a header over kMaxHeaderBytes,
// and what the file reports.
absl::StatusOr<Header> ReadHeader(ReadableFile& file);

// The name of a dtype in the format, "" if it has none (complex32,
// complex128).
absl::string_view NameOfDType(DType dtype);

// What precedes the elements in a file: length and JSON, padded with spaces so
// that the elements begin at a multiple of 64. Uses names, dtypes, shapes and
// offsets of `tensors` (in any order) and `metadata`. Names are UTF-8, dtypes
// have names in the format. ResourceExhausted for more than kMaxHeaderBytes.
absl::StatusOr<std::string> EncodeHeader(const Header& header);

}  // namespace dsd::safetensors

#endif  // DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_HEADER_H_
