// SPDX-License-Identifier: Apache-2.0
//
// One rank's model and optimizers of a configuration, and their text.

#ifndef DSD_TESTING_ORACLE_STATE_DICT_JOB_H_
#define DSD_TESTING_ORACLE_STATE_DICT_JOB_H_

#include <string>
#include <vector>

#include "dsd/core/comm/communicator.h"
#include "dsd/testing/oracle/state_dict/golden_file.h"

namespace dsd::oracle {

// What this rank gets, as get() in state_dict_oracle.py. Throws what LibTorch
// throws.
Outcome Get(const GoldenFile& file, const Configuration& c, Communicator* comm);

// What is there after the set, as set() in state_dict_oracle.py. A call that
// fails must change nothing: where it does, the line after "raised" says so.
Outcome Set(const GoldenFile& file, const Configuration& c, Communicator* comm);

// A key of the model's dict.
struct KeyInfo {
  std::string name;
  std::string canonical;  // the first name of the same tensor
  bool is_parameter;
  // Type, shape and distribution as in results, "distributed float32 [3]
  // mesh[2] S(0)".
  std::string like;
};

// All keys in order, of side "A" or "B".
std::vector<KeyInfo> KeysOf(const GoldenFile& file, const Configuration& c,
                            const std::string& side);

// The text of a tensor like `like`, which may be a whole text, with one value
// everywhere or with the pattern of `tag`.
std::string ConstantText(const std::string& like, int rank, double value);
std::string PatternText(const std::string& like, int rank,
                        const std::string& tag);

}  // namespace dsd::oracle

#endif  // DSD_TESTING_ORACLE_STATE_DICT_JOB_H_
