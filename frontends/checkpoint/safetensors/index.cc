// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/safetensors/index.h"

#include <limits>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/safetensors/json_events.h"
#include "nlohmann/json.hpp"

namespace dsd::safetensors {
namespace {

constexpr size_t kMaxDims = 64;

std::string Quoted(absl::string_view name) {
  return absl::StrCat("\"", absl::CHexEscape(name.substr(0, 256)), "\"");
}

bool IsFileName(absl::string_view name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(absl::string_view("/\\\0", 3)) ==
             absl::string_view::npos;
}

class IndexReader : public JsonEvents {
 public:
  explicit IndexReader(Index* index) : index_(*index) {}
  bool has_weight_map() const { return has_weight_map_; }

 protected:
  bool OnOpen(bool is_object) override {
    if (depth() == 0) return is_object || Fail("no JSON object");
    if (key(0) != "weight_map") return true;
    has_weight_map_ = depth() == 1 && is_object;
    return has_weight_map_ || Fail("weight_map is no object of texts");
  }
  bool OnText(std::string& value) override {
    if (depth() == 0) return Fail("no JSON object");
    if (key(0) != "weight_map") return true;
    if (depth() != 2) return Fail("weight_map is no object of texts");
    if (!IsFileName(value)) {
      return Fail(absl::StrCat("the file of ", Quoted(key(1)), " is ",
                               Quoted(value),
                               ", expected a name in the directory"));
    }
    index_.weight_map.emplace_back(key(1), std::move(value));
    return true;
  }
  bool OnNumber(uint64_t) override { return OnOther(); }
  bool OnOther() override {
    if (depth() == 0) return Fail("no JSON object");
    return key(0) != "weight_map" || Fail("weight_map is no object of texts");
  }

 private:
  Index& index_;
  bool has_weight_map_ = false;
};

class ShardingReader : public JsonEvents {
 public:
  using Places = absl::flat_hash_map<std::string, ShardPlace>;
  explicit ShardingReader(Places* places) : places_(*places) {}

 protected:
  bool OnOpen(bool is_object) override {
    if (depth() < 2) {
      if (!is_object) return Bad();
      if (depth() == 1) places_[key(0)];
      return true;
    }
    return !IsKnown() || (depth() == 2 && !is_object) || Bad();
  }
  bool OnNumber(uint64_t value) override {
    if (depth() < 2) return Bad();
    if (!IsKnown()) return true;
    ShardPlace& place = places_[key(0)];
    Dims& dims = key(1) == "saved_offsets" ? place.offsets : place.global_shape;
    if (depth() != 3 || dims.size() >= kMaxDims ||
        value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Bad();
    }
    dims.push_back(static_cast<int64_t>(value));
    return true;
  }
  bool OnText(std::string&) override { return OnOther(); }
  bool OnOther() override { return (depth() >= 2 && !IsKnown()) || Bad(); }

 private:
  bool IsKnown() const {
    return key(1) == "saved_offsets" || key(1) == "global_shape";
  }
  bool Bad() {
    return Fail(
        absl::StrCat("expected {name: {\"saved_offsets\": [numbers]}}",
                     depth() > 0 ? absl::StrCat(", at ", Quoted(key(0))) : ""));
  }

  Places& places_;
};

}  // namespace

absl::StatusOr<Index> ParseIndex(absl::string_view json) {
  Index index;
  IndexReader reader(&index);
  DSD_RETURN_IF_ERROR(reader.Read(json)) << "safetensors index";
  if (!reader.has_weight_map()) {
    return absl::DataLossError("safetensors index: it has no weight_map");
  }
  return index;
}

std::string EncodeIndex(const Index& index, int64_t total_bytes) {
  nlohmann::json json;
  json["metadata"]["total_size"] = total_bytes;
  nlohmann::json& map = json["weight_map"] = nlohmann::json::object();
  for (const auto& [name, file] : index.weight_map) map[name] = file;
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) +
         "\n";
}

absl::StatusOr<absl::flat_hash_map<std::string, ShardPlace>> ParseSharding(
    absl::string_view json) {
  absl::flat_hash_map<std::string, ShardPlace> places;
  DSD_RETURN_IF_ERROR(ShardingReader(&places).Read(json)) << kShardingKey;
  return places;
}

}  // namespace dsd::safetensors
