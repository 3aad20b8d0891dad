// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/safetensors/json_events.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace dsd::safetensors {
namespace {

constexpr size_t kMaxDepth = 32;
// Of a key in an error.
constexpr size_t kShownBytes = 64;

}  // namespace

absl::Status JsonEvents::Read(absl::string_view text) {
  frames_.clear();
  status_ = absl::OkStatus();
  const bool done = nlohmann::json::sax_parse(
      text.begin(), text.end(),
      static_cast<nlohmann::json_sax<nlohmann::json>*>(this));
  if (!done && status_.ok()) Fail("the JSON ends early");
  return status_;
}

bool JsonEvents::Fail(absl::string_view what) {
  if (status_.ok()) status_ = absl::DataLossError(what);
  return false;
}

bool JsonEvents::key(std::string& value) {
  Frame& frame = frames_.back();
  frame.key = value;
  if (frame.keys.insert(std::move(value)).second) return true;
  return Fail(absl::StrCat(
      "\"",
      absl::CHexEscape(absl::string_view(frame.key).substr(0, kShownBytes)),
      "\" is there twice"));
}

bool JsonEvents::parse_error(size_t position, const std::string& last_token,
                             const nlohmann::json::exception&) {
  return Fail(absl::StrCat(
      "no JSON at byte ", position, ", at \"",
      absl::CHexEscape(absl::string_view(last_token).substr(0, kShownBytes)),
      "\""));
}

bool JsonEvents::Open(bool is_object) {
  if (frames_.size() >= kMaxDepth) {
    return Fail(absl::StrCat("JSON nested more than ", kMaxDepth, " deep"));
  }
  if (!OnOpen(is_object)) return false;
  frames_.emplace_back();
  return true;
}

bool JsonEvents::Close() {
  frames_.pop_back();
  return OnClose();
}

}  // namespace dsd::safetensors
