// SPDX-License-Identifier: Apache-2.0

#ifndef DSD_CORE_COMM_WORLD_SIZE_H_
#define DSD_CORE_COMM_WORLD_SIZE_H_

namespace dsd {

// More ranks are taken for a mistake, or for a stranger's message: some tables
// have an entry for each.
inline constexpr int kMaxWorldSize = 1 << 20;

}  // namespace dsd

#endif  // DSD_CORE_COMM_WORLD_SIZE_H_
