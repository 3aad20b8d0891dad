// SPDX-License-Identifier: Apache-2.0
//
// Writes Python pickles, opcode by opcode.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_WRITER_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_WRITER_H_

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"

namespace dsd::dcp {

// Whether Python can decode the text.
bool IsUtf8(absl::string_view text);

// Appends to a string, which the caller may empty between calls. Protocol 2
// output uses only what torch.load(weights_only=True) reads and no memo, but
// for one: protocol 4 memoizes globals and texts that are asked for by Shared*.
class PickleWriter {
 public:
  // `protocol`: 2 or 4.
  PickleWriter(int protocol, std::string* out);

  void None() { Op('N'); }
  void Bool(bool value) { Op(value ? '\x88' : '\x89'); }
  void Int(int64_t value);
  // Two's complement, little-endian, the shortest: at most 255 bytes.
  void WideInt(absl::string_view bytes);
  void Float(double value);
  void Text(absl::string_view text);
  // Protocol 2 has no bytes: a call that Python evaluates to them.
  void Bytes(absl::string_view bytes);
  // Protocol 2: calls, as for Bytes.
  void Complex(double real, double imaginary);
  void Global(absl::string_view module, absl::string_view name);

  // A text that occurs again: written once, then recalled. Protocol 4.
  void SharedText(absl::string_view text);

  void Mark() { Op('('); }
  void EmptyDict() { Op('}'); }
  void EmptyList() { Op(']'); }
  // Pops `count` values, or those above the mark if count > 3; the mark is the
  // caller's.
  void Tuple(int64_t count);
  void SetItems() { Op('u'); }
  void Append() { Op('a'); }
  void Appends() { Op('e'); }
  void Reduce() { Op('R'); }
  // An instance of the class on the stack without arguments.
  void NewInstance() { out_->append(")\x81"); }
  void Build() { Op('b'); }
  void PersistentId() { Op('Q'); }
  void Stop() { Op('.'); }

 private:
  void Op(char op) { out_->push_back(op); }
  void Memoize() {
    Op('\x94');
    ++memo_size_;
  }
  void Recall(uint32_t index);

  const int protocol_;
  std::string* const out_;
  uint32_t memo_size_ = 0;
  absl::flat_hash_map<std::string, uint32_t> texts_;
  absl::flat_hash_map<std::string, uint32_t> globals_;  // "module\nname"
};

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_WRITER_H_
