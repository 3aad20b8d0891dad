// SPDX-License-Identifier: Apache-2.0
//
// JSON as events, for text that nobody vouches for: no tree in memory, no
// recursion, bounded depth, no key twice.

#ifndef DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_JSON_EVENTS_H_
#define DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_JSON_EVENTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace dsd::safetensors {

// A reader derives from it and overrides what it cares for. Each On... returns
// whether to go on; Fail gives the reason not to.
class JsonEvents : private nlohmann::json_sax<nlohmann::json> {
 public:
  // DataLoss where `text` is not one JSON value, or what Fail was told.
  absl::Status Read(absl::string_view text);

 protected:
  // Nesting of the value that an event is about: 0 for the whole, 1 for what is
  // directly in it.
  size_t depth() const { return frames_.size(); }
  // The key, "" in an array, under which the value of the event lies in the
  // container of `level` (0: the whole).
  const std::string& key(size_t level) const { return frames_[level].key; }

  virtual bool OnText(std::string& /*value*/) { return true; }
  virtual bool OnNumber(uint64_t /*value*/) { return true; }
  // Null, a boolean, a negative or fractional number.
  virtual bool OnOther() { return true; }
  // Before what is in a container, and after it.
  virtual bool OnOpen(bool /*is_object*/) { return true; }
  virtual bool OnClose() { return true; }

  bool Fail(absl::string_view what);

 private:
  struct Frame {
    std::string key;
    absl::flat_hash_set<std::string> keys;
  };

  bool null() override { return OnOther(); }
  bool boolean(bool) override { return OnOther(); }
  bool number_integer(int64_t) override { return OnOther(); }
  bool number_unsigned(uint64_t value) override { return OnNumber(value); }
  bool number_float(double, const std::string&) override { return OnOther(); }
  bool string(std::string& value) override { return OnText(value); }
  bool binary(nlohmann::json::binary_t&) override { return false; }
  bool start_object(size_t) override { return Open(true); }
  bool end_object() override { return Close(); }
  bool start_array(size_t) override { return Open(false); }
  bool end_array() override { return Close(); }
  bool key(std::string& value) override;
  bool parse_error(size_t position, const std::string& last_token,
                   const nlohmann::json::exception& error) override;

  bool Open(bool is_object);
  bool Close();

  std::vector<Frame> frames_;
  absl::Status status_;
};

}  // namespace dsd::safetensors

#endif  // DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_JSON_EVENTS_H_
