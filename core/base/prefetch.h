// SPDX-License-Identifier: Apache-2.0
//
// Memory that is needed soon. State dicts are thousands of small objects that
// lie apart; a walk over them spends its time waiting for one after the other
// unless it asks for the next ones early.

#ifndef DSD_CORE_BASE_PREFETCH_H_
#define DSD_CORE_BASE_PREFETCH_H_

#include <cstddef>

#include "absl/base/prefetch.h"

namespace dsd {

// Any address will do: nothing is read.
inline void PrefetchBytes(const void* object, size_t bytes) {
  constexpr size_t kLineBytes = 64;
  const char* const first = static_cast<const char*>(object);
  for (size_t at = 0; at < bytes; at += kLineBytes) {
    absl::PrefetchToLocalCache(first + at);
  }
}

}  // namespace dsd

#endif  // DSD_CORE_BASE_PREFETCH_H_
