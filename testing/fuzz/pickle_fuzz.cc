// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as a pickle: parsed, walked, decoded as an object, which is encoded
// again.

#include <cstdint>
#include <cstdlib>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"

namespace {

using dsd::dcp::PickleValue;

// Values may contain themselves and be shared.
void Walk(PickleValue value, int depth, int* visits) {
  if (depth > 50 || --*visits < 0) return;
  (void)value.AsBool();
  (void)value.AsInt();
  (void)value.AsFloat();
  (void)value.AsString();
  (void)value.AsBytes();
  (void)value.AsBigInt();
  (void)value.module();
  (void)value.name();
  (void)value.Find("key");
  size_t items = 0;
  value.ForEachItem([&](PickleValue item) {
    Walk(item, depth + 1, visits);
    ++items;
    return *visits > 0;
  });
  value.ForEachEntry([&](PickleValue key, PickleValue item) {
    Walk(key, depth + 1, visits);
    Walk(item, depth + 1, visits);
    ++items;
    return *visits > 0;
  });
  if (*visits > 0 && items < value.size()) std::abort();
  switch (value.kind()) {
    case PickleValue::Kind::kCall:
    case PickleValue::Kind::kInstance:
      Walk(value.args(), depth + 1, visits);
      if (const auto state = value.state()) Walk(*state, depth + 1, visits);
      [[fallthrough]];
    case PickleValue::Kind::kPersistentId:
      Walk(value.callee(), depth + 1, visits);
      break;
    default:
      break;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  dsd::dcp::PickleLimits limits;
  limits.max_memory_bytes = int64_t{64} << 20;
  limits.allow_persistent_ids = true;
  const absl::StatusOr<dsd::dcp::Pickle> pickle =
      dsd::dcp::Pickle::Parse(bytes, limits);
  if (!pickle.ok()) return 0;
  int visits = 10000;
  Walk(pickle->root(), 0, &visits);
  const absl::StatusOr<dsd::dcp::ObjectItem> item =
      dsd::dcp::DecodeObjectPickle(bytes);
  if (!item.ok()) return 0;
  const absl::StatusOr<std::string> again =
      dsd::dcp::EncodeStoredObject(item->value);
  if (!again.ok()) return 0;
  const absl::StatusOr<dsd::dcp::ObjectItem> back =
      dsd::dcp::DecodeStoredObject(*again);
  if (!back.ok() || back->digest != item->digest) std::abort();
  return 0;
}
