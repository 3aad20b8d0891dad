// SPDX-License-Identifier: Apache-2.0
//
// Constants of the zip format (APPNOTE.TXT).

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_FORMAT_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_FORMAT_H_

#include <cstdint>

namespace dsd::dcp {

inline constexpr uint32_t kLocalHeaderSignature = 0x04034B50;
inline constexpr uint32_t kDescriptorSignature = 0x08074B50;
inline constexpr uint32_t kDirectoryEntrySignature = 0x02014B50;
inline constexpr uint32_t kZip64EndSignature = 0x06064B50;
inline constexpr uint32_t kZip64LocatorSignature = 0x07064B50;
inline constexpr uint32_t kEndSignature = 0x06054B50;

inline constexpr int64_t kLocalHeaderBytes = 30;
inline constexpr int64_t kDirectoryEntryBytes = 46;
inline constexpr int64_t kZip64EndBytes = 56;
inline constexpr int64_t kZip64LocatorBytes = 20;
inline constexpr int64_t kEndBytes = 22;

inline constexpr uint16_t kZip64FieldId = 0x0001;
// A 32-bit field of this value says: see the zip64 field.
inline constexpr int64_t kZip32Max = 0xFFFFFFFF;

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_FORMAT_H_
