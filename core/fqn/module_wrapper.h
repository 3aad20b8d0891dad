// SPDX-License-Identifier: Apache-2.0
//
// What a module that stands around another one says about itself, so that it
// leaves no trace in FQNs.

#ifndef DSD_CORE_FQN_MODULE_WRAPPER_H_
#define DSD_CORE_FQN_MODULE_WRAPPER_H_

#include "absl/strings/string_view.h"

namespace dsd {

// Segments under which PyTorch's own wrappers register the module they wrap. A
// C++ wrapper that uses the same names writes the same raw paths.
inline constexpr absl::string_view kDdpSegment = "module";
inline constexpr absl::string_view kCompileSegment = "_orig_mod";
inline constexpr absl::string_view kCheckpointSegment =
    "_checkpoint_wrapped_module";
inline constexpr absl::string_view kFsdpSegment = "_fsdp_wrapped_module";

// Inherited by a module class beside its module base:
//
//   class Timed : public torch::nn::Module, public dsd::ModuleWrapper {
//    public:
//     explicit Timed(std::shared_ptr<Net> net)
//         : net_(register_module("module", std::move(net))) {}
//     absl::string_view wrapped_child_name() const override { return "module";
//     }
//     ...
//
// A wrapper is known by its class, never by the text of a name: a child that is
// called "module" in any other class keeps its segment.
class ModuleWrapper {
 public:
  // The name under which the wrapped module is registered as a child. That
  // segment is left out of FQNs; tensors and other children of the wrapper keep
  // theirs. The text lives as long as the module.
  virtual absl::string_view wrapped_child_name() const = 0;

 protected:
  ~ModuleWrapper() = default;
};

}  // namespace dsd

#endif  // DSD_CORE_FQN_MODULE_WRAPPER_H_
