// SPDX-License-Identifier: Apache-2.0
//
// Agreement on what is about to be moved. If ranks disagree, each of them
// learns which tensors, options and ranks it is about.

#ifndef DSD_CORE_TRANSFER_AGREE_ON_CATALOGS_H_
#define DSD_CORE_TRANSFER_AGREE_ON_CATALOGS_H_

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/plan/catalog.h"

namespace dsd {

// As Agree, with a `fingerprint` that covers `catalogs` (at least one, the
// source first) and whatever `describe` puts into words. FailedPrecondition
// lists every tensor that a rank lacks or knows by another type, shape or
// layout, with the ranks, and the words of ranks that differ in them. Costs one
// message of 41 bytes where ranks agree, else digests of 256 parts of the
// catalogs, and then those parts that differ. Collective.
absl::Status AgreeOnCatalogs(Communicator* comm, absl::string_view what,
                             absl::Span<const Catalog* const> catalogs,
                             const Digest& fingerprint,
                             const absl::Status& local,
                             absl::FunctionRef<std::string()> describe,
                             const CallOptions& options = {});

}  // namespace dsd

#endif  // DSD_CORE_TRANSFER_AGREE_ON_CATALOGS_H_
