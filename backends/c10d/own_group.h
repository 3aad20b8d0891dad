// SPDX-License-Identifier: Apache-2.0
//
// Process groups for tests. Included apart from c10d's own header of Gloo's
// group, which needs Gloo's headers.

#ifndef DSD_BACKENDS_C10D_OWN_GROUP_H_
#define DSD_BACKENDS_C10D_OWN_GROUP_H_

#include <string>

#include "absl/status/statusor.h"
#include "c10/util/intrusive_ptr.h"

namespace c10d {
class Backend;
}

namespace dsd {

// A group of Gloo's on the loopback interface, whose ranks meet in a file that
// none of them has made. Collective.
absl::StatusOr<c10::intrusive_ptr<c10d::Backend>> MakeGlooGroup(
    const std::string& path, int rank, int size);

}  // namespace dsd

#endif  // DSD_BACKENDS_C10D_OWN_GROUP_H_
