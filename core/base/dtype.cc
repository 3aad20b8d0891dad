// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/dtype.h"

#include <cstddef>

namespace dsd {
namespace {

struct Info {
  absl::string_view name;
  int64_t item_size;
};

constexpr Info kInfos[kNumDTypes] = {
    {"float32", 4},         {"float64", 8},
    {"float16", 2},         {"bfloat16", 2},
    {"complex32", 4},       {"complex64", 8},
    {"complex128", 16},     {"int8", 1},
    {"int16", 2},           {"int32", 4},
    {"int64", 8},           {"uint8", 1},
    {"uint16", 2},          {"uint32", 4},
    {"uint64", 8},          {"bool", 1},
    {"float8_e4m3fn", 1},   {"float8_e5m2", 1},
    {"float8_e4m3fnuz", 1}, {"float8_e5m2fnuz", 1},
    {"float8_e8m0fnu", 1},  {"float4_e2m1fn_x2", 1},
};

}  // namespace

int64_t ItemSize(DType dtype) {
  return kInfos[static_cast<size_t>(dtype)].item_size;
}

absl::string_view DTypeName(DType dtype) {
  return kInfos[static_cast<size_t>(dtype)].name;
}

std::optional<DType> ParseDType(absl::string_view name) {
  for (int i = 0; i < kNumDTypes; ++i) {
    if (kInfos[i].name == name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

}  // namespace dsd
