// SPDX-License-Identifier: Apache-2.0
//
// What a frontend implements: a model and an optimizer as get and set see them.
// Sources only describe; all movement and checking is done by SourceSession.

#ifndef DSD_CORE_STATE_DICT_SOURCES_H_
#define DSD_CORE_STATE_DICT_SOURCES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/fqn/module_tree.h"
#include "dsd/core/state_dict/extra_state.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// A tree of modules with tensors. Thread-compatible.
class ModelSource {
 public:
  virtual ~ModelSource() = default;

  // The live tensors as they are now, all defined, in a fixed order: the slot
  // of a tensor is its index. Called for every operation, so cheap.
  virtual absl::Status ForEachTensor(
      absl::FunctionRef<void(const at::Tensor&)> visit) = 0;

  // Extra states in a fixed order: the slot of one is its index.
  virtual absl::StatusOr<std::vector<ExtraState*>> ExtraStates() {
    return std::vector<ExtraState*>();
  }

  // Another number whenever Describe() might answer something else for the same
  // tensors. Asked after ForEachTensor, for what that saw.
  virtual int64_t revision() { return 0; }

  // The tree that names them. Called when any of the above has changed.
  virtual absl::StatusOr<ModuleNode> Describe() = 0;
};

// One entry of a parameter's state in an optimizer.
struct StateField {
  enum class Shape : uint8_t {
    kLikeParameter,  // a tensor of the parameter's shape, sharded as it is
    kCount,          // a whole number >= 0, or a tensor of one element
    kAny,            // anything; tensors in it are whole on every rank
  };

  std::string name;
  Shape shape = Shape::kLikeParameter;
  // Whether a parameter that has state has this entry.
  bool required = true;
};

// For each of `fields` the plain tensor of that name, or an undefined one.
void PlainTensorsOf(const StateDict& state, absl::Span<const StateField> fields,
                    absl::Span<at::Tensor> out);

// An optimizer: groups of parameters with hyperparameters, and state per
// parameter. Parameters are the model's tensors. Thread-compatible.
class OptimizerSource {
 public:
  virtual ~OptimizerSource() = default;

  // The class, for messages: "AdamW".
  virtual absl::string_view type_name() const = 0;

  virtual size_t num_groups() const = 0;
  virtual absl::Span<const at::Tensor> params(size_t group) const = 0;

  // All hyperparameters of the group under Python's names and in its order,
  // those that only Python's class has included (with its defaults, or as
  // loaded).
  virtual absl::StatusOr<ObjectDict> Hyperparameters(size_t group) const = 0;

  // Whether SetHyperparameters would take `values`; changes nothing. `values`
  // may lack some and have unknown ones, which are kept. If `strict`, values
  // that this optimizer would ignore although they change the training are
  // refused.
  virtual absl::Status CheckHyperparameters(size_t group,
                                            const ObjectDict& values,
                                            bool strict) const = 0;

  // Hyperparameters not in `values` keep theirs.
  virtual absl::Status SetHyperparameters(size_t group,
                                          const ObjectDict& values) = 0;

  // The entries that a parameter's state has if the group's hyperparameters are
  // `hyperparameters` (all of them), in Python's order.
  virtual absl::StatusOr<std::vector<StateField>> StateFields(
      const ObjectDict& hyperparameters) const = 0;

  // Whether all parameters of a group have one state between them, kept under
  // the group's first one (LBFGS). Its fields are kAny. Such a group must have
  // the same parameters in the same order where it is loaded, and none of them
  // sharded.
  virtual bool has_group_state() const { return false; }

  // Says that State() or LiveTensors() of parameters [begin, end) are asked for
  // soon. Nothing changes.
  virtual void PrefetchStates(size_t /*group*/, size_t /*begin*/,
                              size_t /*end*/) const {}

  // The live state of a parameter: this rank's tensors (aliases) and objects.
  // Empty if there is none.
  virtual absl::StatusOr<StateDict> State(size_t group, size_t param) const = 0;

  // PlainTensorsOf State(); undefined ones for counts, if that is cheaper. A
  // cheap answer makes sets fast.
  virtual absl::Status LiveTensors(size_t group, size_t param,
                                   absl::Span<const StateField> fields,
                                   absl::Span<at::Tensor> out) const;

  // Adds to `changed`, in ascending order, the parameters of the group for
  // which State() may return something else (other tensors or values) than when
  // this was last called with these `marks`, which are the source's own notes
  // and empty at first. Tensors may be told apart by address: the caller keeps
  // those that State() has returned. Saying that all have changed is always
  // right; a cheaper answer makes the second get of a session faster.
  virtual void FindChangedStates(size_t group, std::vector<uint64_t>& /*marks*/,
                                 std::vector<size_t>& changed) const {
    for (size_t i = 0; i < params(group).size(); ++i) changed.push_back(i);
  }

  // What the state would be before the first step, in new tensors; the
  // optimizer is not changed. Empty if the class has nothing then.
  virtual absl::StatusOr<StateDict> InertState(size_t group,
                                               size_t param) const = 0;

  // Whether SetState would take `entries`, which are as StateFields says, in a
  // group with these hyperparameters (all of them); changes nothing. Tensors in
  // it may be without values on this rank. InvalidArgument says what is wrong.
  virtual absl::Status CheckState(size_t /*group*/,
                                  const ObjectDict& /*hyperparameters*/,
                                  const StateDict& /*entries*/) const {
    return absl::OkStatus();
  }

  // Makes `state` (entries as in StateFields; tensors with Local()) the whole
  // state of the parameter. Keeps the tensors. Empty: no state.
  virtual absl::Status SetState(size_t group, size_t param,
                                StateDict state) = 0;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_SOURCES_H_
