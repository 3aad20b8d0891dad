// SPDX-License-Identifier: Apache-2.0
//
// Integers in the byte order of the formats here, which is the machine's.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_LITTLE_ENDIAN_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_LITTLE_ENDIAN_H_

#include <cstring>
#include <string>

namespace dsd::dcp {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "big-endian machines are not supported");

template <class T>
T LoadLittleEndian(const void* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

template <class T>
void AppendLittleEndian(std::string* out, T value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_LITTLE_ENDIAN_H_
