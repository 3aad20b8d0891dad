// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/optimizer/codec.h"

#include <memory>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "absl/base/no_destructor.h"
#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "c10/util/Type.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/optimizer/builtin_codecs.h"
#include "torch/optim/optimizer.h"

namespace dsd {
namespace {

class Registry {
 public:
  static Registry& Get() {
    static absl::NoDestructor<Registry> registry;
    return *registry;
  }

  Registry() {
    codecs_.push_back(MakeSgdCodec());
    codecs_.push_back(MakeAdamCodec());
    codecs_.push_back(MakeAdamWCodec());
    codecs_.push_back(MakeAdagradCodec());
    codecs_.push_back(MakeRmspropCodec());
    codecs_.push_back(MakeLbfgsCodec());
  }

  void Add(std::unique_ptr<const OptimizerCodec> codec) {
    absl::MutexLock lock(&mu_);
    codecs_.push_back(std::move(codec));
  }

  absl::StatusOr<const OptimizerCodec*> Find(
      const torch::optim::Optimizer& optimizer) const {
    absl::ReaderMutexLock lock(&mu_);
    for (auto codec = codecs_.rbegin(); codec != codecs_.rend(); ++codec) {
      if ((*codec)->Matches(optimizer)) return codec->get();
    }
    return absl::NotFoundError(
        absl::StrCat("no codec for optimizers of class \"",
                     c10::demangle(typeid(optimizer).name()), "\" (there are: ",
                     absl::StrJoin(codecs_, ", ",
                                   [](std::string* out, const auto& codec) {
                                     absl::StrAppend(out, codec->name());
                                   }),
                     "); write one and call RegisterOptimizerCodec"));
  }

 private:
  mutable absl::Mutex mu_;
  std::vector<std::unique_ptr<const OptimizerCodec>> codecs_
      ABSL_GUARDED_BY(mu_);
};

}  // namespace

absl::Status OptimizerCodec::LiveTensors(
    const torch::optim::OptimizerParamState& state,
    absl::Span<const StateField> fields, absl::Span<at::Tensor> out) const {
  DSD_ASSIGN_OR_RETURN(const StateDict entries, GetState(state));
  PlainTensorsOf(entries, fields, out);
  return absl::OkStatus();
}

void RegisterOptimizerCodec(std::unique_ptr<const OptimizerCodec> codec) {
  Registry::Get().Add(std::move(codec));
}

absl::StatusOr<const OptimizerCodec*> FindOptimizerCodec(
    const torch::optim::Optimizer& optimizer) {
  return Registry::Get().Find(optimizer);
}

}  // namespace dsd
