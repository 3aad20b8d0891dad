// SPDX-License-Identifier: Apache-2.0
//
// One stored object that is not a tensor, though some may be in it: the archive
// that torch.save(object) writes.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_OBJECT_ITEM_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_OBJECT_ITEM_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"
#include "dsd/frontends/checkpoint/dcp/zip_reader.h"

namespace dsd::dcp {

inline constexpr int64_t kMaxObjectBytes = int64_t{1} << 30;
inline constexpr int kMaxObjectDepth = 200;

// A decoded object and the digest of its value. Objects of classes that are not
// plain data become Opaque, each alone: a list with one in it is a list.
// Tensors are HostTensors where their elements are at hand.
struct ObjectItem {
  Object value;
  Digest128 digest;
};

// Whether an Opaque of this type is a dtype, "torch.float32": no class, but a
// value that Python finds by its name, and all of which the name says.
bool IsTorchDType(absl::string_view type_name);

// Errors: DataLoss (damaged, or nested too deeply); ResourceExhausted (more
// than kMaxObjectBytes, or more values than bytes through sharing);
// Unimplemented (compressed).
absl::StatusOr<ObjectItem> DecodeObjectPickle(absl::string_view pickle);

// What is left to unfold of a pickle, in which values may be shared.
struct ObjectBudget {
  explicit ObjectBudget(int64_t pickle_bytes);

  int64_t values_left;
  int64_t bytes_left;
};

// Gives the elements of a tensor in a pickle. Unimplemented for kinds of
// tensors that have no plain form.
using ReadTensorFn =
    std::function<absl::StatusOr<HostTensor>(PickleValue tensor)>;

// One value of a pickle that has more than it. A value without a canonical form
// is told from others by `bytes`, those of all. Without `read_tensor`, tensors
// are Opaque.
absl::StatusOr<ObjectItem> DecodeObjectValue(
    PickleValue value, absl::string_view bytes, ObjectBudget* budget,
    const ReadTensorFn& read_tensor = {});

// What a stored object is made of, by the same limits: the pickle in its
// archive, or the archive itself if there are tensors in it.
absl::StatusOr<std::string> ReadStoredObject(FileSlice* slice);

// Decodes what ReadStoredObject gives.
absl::StatusOr<ObjectItem> DecodeStoredObject(absl::string_view stored);

// A value as a pickle, and the storages of the tensors in it: the records
// "data/<first_storage>" and on.
struct ObjectPickle {
  std::string pickle;
  std::vector<HostTensor> storages;
};

// The same for equal values.
// Errors: InvalidArgument for an Opaque other than a dtype of torch's, text
// that is not UTF-8, a tensor in a set or without all of its elements, nesting
// over kMaxObjectDepth.
absl::StatusOr<ObjectPickle> EncodeObjectPickle(const Object& value,
                                                int64_t first_storage = 0);

// What a value is stored as, in the form of ReadStoredObject.
// Errors: of EncodeObjectPickle; InvalidArgument over kMaxObjectBytes.
absl::StatusOr<std::string> EncodeStoredObject(const Object& value);

// The archive of what is stored.
std::string ObjectArchive(absl::string_view stored);

// The digest of a value, by what it is stored as.
Digest128 ObjectDigest(absl::string_view stored,
                       DigestVersion version = kDigestVersion);

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_OBJECT_ITEM_H_
