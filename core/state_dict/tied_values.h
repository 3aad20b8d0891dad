// SPDX-License-Identifier: Apache-2.0
//
// Names of one live tensor for which a dict has values that differ.

#ifndef DSD_CORE_STATE_DICT_TIED_VALUES_H_
#define DSD_CORE_STATE_DICT_TIED_VALUES_H_

#include <string>
#include <vector>

#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/state_dict/model_state.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// A name of a live tensor and an earlier one, for which the dict has other
// values.
struct TiedDifference {
  std::string key;
  std::string first;
};

// Those that this rank can see: in memory that it has. For dicts that fit.
std::vector<TiedDifference> FindTiedDifferences(LiveModel& live,
                                                const KeyScope& scope,
                                                const StateDict& dict);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_TIED_VALUES_H_
