// SPDX-License-Identifier: Apache-2.0
//
// Which dsd this is. All ranks of a job must be of one: what they plan for
// themselves has to fit together.

#ifndef DSD_CORE_BASE_VERSION_H_
#define DSD_CORE_BASE_VERSION_H_

namespace dsd {

inline constexpr char kLibraryVersion[] = "0.1.0";

}  // namespace dsd

#endif  // DSD_CORE_BASE_VERSION_H_
