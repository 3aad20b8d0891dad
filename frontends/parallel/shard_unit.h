// SPDX-License-Identifier: Apache-2.0
//
// The parameters that FullyShard gathers and cuts together, and the autograd
// hooks that do it in time. Free of torch/nn.

#ifndef DSD_FRONTENDS_PARALLEL_SHARD_UNIT_H_
#define DSD_FRONTENDS_PARALLEL_SHARD_UNIT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/flat_hash_set.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"
#include "dsd/frontends/parallel/fully_shard_context.h"

namespace torch::autograd {
struct Node;
}  // namespace torch::autograd

namespace dsd {
namespace internal {

// How it works. Each parameter keeps its TensorImpl; Unshard and Reshard swap
// its data between the shard and `full`, a tensor whose one storage is freed
// and filled again in place: what autograd saved of it during forward() is
// valid again after the next Unshard. Three points in a backward pass:
//   - a hook on each output unshards, and puts .grad aside, because
//     AccumulateGrad is to see none of another shape;
//   - a node on the input side, which runs after all nodes of the call, reduces
//     the gradients and reshards;
//   - a callback at the end of the pass does both for calls without such a
//   node.
// Not in a hook of AccumulateGrad: that node runs before others that still read
// the parameter. If the pass ends with an exception the callback is destroyed
// unrun and thereby undoes what was begun.
class ShardUnit : public std::enable_shared_from_this<ShardUnit> {
 public:
  // One call of the wrapped module's forward(). The constructor unshards and
  // replaces `inputs` that require a gradient; the destructor reshards.
  class Call {
   public:
    Call(std::shared_ptr<ShardUnit> unit, absl::Span<at::Tensor* const> inputs);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    // Hooks `outputs`; an output that shares memory with a parameter is
    // replaced by a copy. Not called if forward() threw.
    void Finish(absl::Span<at::Tensor* const> outputs);

   private:
    explicit Call(std::shared_ptr<ShardUnit> unit);

    const std::shared_ptr<ShardUnit> unit_;
    const bool recorded_;  // by autograd
    const int64_t id_;
  };

  // `type_name` of the wrapped module, for error texts.
  ShardUnit(std::shared_ptr<FullyShardContext> context, std::string type_name);

  // Checks a parameter and adds it; one that was added before counts once.
  // `name` is relative to the wrapped module. Throws StatusError.
  void Add(const std::string& name, const at::Tensor& parameter);

  // Cuts all added parameters. Call once.
  void Shard();

 private:
  class InputNode;
  class BackwardGuard;

  struct Slot {
    std::string name;
    at::Tensor parameter;
    int64_t rows = 0;
    int64_t row_elements = 0;
    bool bucketed = false;  // travels in the unit's shared message
    at::Tensor shard;  // this rank's rows, while the parameter has them all
    at::Tensor full;   // its storage is empty while not unsharded
    // Made while the parameter had its full shape and kept until the end of the
    // backward pass: AccumulateGrad checks shapes against the first one it saw.
    std::shared_ptr<torch::autograd::Node> accumulator;
    at::Tensor earlier_grad;  // .grad before this backward pass
  };

  // First row of the shard of `rank`; of world_size(): the number of rows.
  int64_t RowBegin(const Slot& slot, int rank) const;
  int64_t ShardElements(const Slot& slot, int rank) const;
  // The rows of the shard of `rank` in a tensor of all, as one dimension.
  at::Tensor PartOf(const at::Tensor& whole, const Slot& slot, int rank) const;
  // Of this rank's shard.
  Dims ShardShape(const Slot& slot) const;
  std::string Describe(const char* what) const;
  [[noreturn]] void Fail(absl::StatusCode code, const Slot& slot,
                         const std::string& text) const;

  void Unshard();
  void GatherAlone(Slot& slot);
  void GatherBucket(absl::Span<Slot* const> slots);
  void Reshard() noexcept;

  void BeforeBackward(int64_t call);
  void InputNodeDone(int64_t call);
  void ReduceGradients();
  void ReduceBucket(DType dtype, absl::Span<Slot* const> slots);
  void ReduceAlone(DType dtype, Slot& slot);
  void SetShardGradient(Slot& slot, at::Tensor sum);
  void FinishBackward();
  void AbandonBackward() noexcept;
  void EndBackward() noexcept;

  const std::shared_ptr<FullyShardContext> context_;
  const std::string type_name_;
  std::vector<Slot> slots_;
  bool unsharded_ = false;
  int64_t next_call_ = 0;
  // Calls since the end of the last backward pass, and calls that this pass has
  // entered, whose input node has not run. They only tell when to reduce early:
  // a call that comes after that, or has no input node, is reduced later.
  absl::flat_hash_set<int64_t> pending_calls_;
  absl::flat_hash_set<int64_t> entered_calls_;
  bool in_backward_ = false;
  bool reduced_ = false;
};

}  // namespace internal
}  // namespace dsd

#endif  // DSD_FRONTENDS_PARALLEL_SHARD_UNIT_H_
