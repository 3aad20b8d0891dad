// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/deliver.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_device_stream.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/core/value/flatten.h"

namespace dsd {
namespace {

// A tensor to move and all the leaves that want the result.
struct Item {
  absl::InlinedVector<TensorValue*, 1> leaves;
  std::optional<TensorValue> result;
};

// Of new memory for the values of `from`.
c10::TensorOptions ResultOptions(const StateDictOptions& options,
                                 const TensorValue& from) {
  const c10::TensorOptions result(from.scalar_type());
  if (from.locals().empty()) return result.device(c10::kCPU);
  const c10::Device device = from.locals()[0].device();
  if (!options.cpu_offload) return result.device(device);
  return result.device(c10::kCPU).pinned_memory(
      options.pin_memory && device.is_cuda() && CanPinMemory());
}

class Delivery {
 public:
  Delivery(const StateDictOptions& options, const Mover& mover,
           const std::vector<Holder>& destinations)
      : options_(options),
        mover_(mover),
        receives_(std::binary_search(destinations.begin(), destinations.end(),
                                     mover.self())),
        source_(mover.NewEndpoint()),
        target_(*DeviceMesh::Create({static_cast<int64_t>(destinations.size())},
                                    destinations),
                mover.self()) {}

  bool receives() const { return receives_; }

  absl::Status Collect(StateDict& root) {
    absl::Status status;
    absl::flat_hash_map<const void*, size_t> index;
    const size_t count = CountTensors(root);
    index.reserve(count);
    items_.reserve(count);
    source_.Reserve(count);
    target_.Reserve(count);
    ForEachTensor(root, "", [&](const std::string& name, TensorValue& leaf) {
      if (!status.ok() || (!options_.full_state_dict && IsInHostMemory(leaf))) {
        return;
      }
      const auto [it, is_new] = index.try_emplace(leaf.id(), items_.size());
      if (is_new) {
        items_.emplace_back();
        status = Annotate(AddPair(name, leaf, items_.back()),
                          absl::StrCat("get \"", name, "\""));
      }
      items_[it->second].leaves.push_back(&leaf);
    });
    return status;
  }

  void Replace() {
    for (Item& item : items_) {
      if (!item.result.has_value()) continue;
      for (TensorValue* leaf : item.leaves) *leaf = *item.result;
    }
  }

  TensorEndpoint& source() { return source_; }
  TensorEndpoint& target() { return target_; }

 private:
  static bool IsInHostMemory(const TensorValue& value) {
    for (const at::Tensor& local : value.locals()) {
      if (local.defined() && !local.device().is_cpu()) return false;
    }
    return true;
  }

  absl::Status AddPair(const std::string& name, const TensorValue& from,
                       Item& item) {
    DSD_RETURN_IF_ERROR(source_.Add(name, from));
    const c10::TensorOptions tensor_options = ResultOptions(options_, from);
    if (!options_.full_state_dict) {
      DSD_ASSIGN_OR_RETURN(
          item.result, MapLocalTensors(from, [&](const at::Tensor& local) {
            return NewTensor(ToDims(local.sizes()), tensor_options);
          }));
      return target_.Add(name, *item.result);
    }
    DSD_ASSIGN_OR_RETURN(Layout layout, target_.ReplicatedLayout(from.shape()));
    absl::Span<const at::Tensor> locals;
    if (receives_) {
      DSD_ASSIGN_OR_RETURN(at::Tensor whole,
                           NewTensor(from.shape(), tensor_options));
      item.result = TensorValue(std::move(whole));
      locals = item.result->locals();
    }
    DSD_ASSIGN_OR_RETURN(const DType dtype, ToDType(from.scalar_type()));
    return target_.Add(TensorSpec{name, dtype, std::move(layout)},
                       mover_.self(), locals);
  }

  const StateDictOptions& options_;
  const Mover& mover_;
  const bool receives_;
  TensorEndpoint source_;
  TensorEndpoint target_;
  std::vector<Item> items_;
};

DigestBuilder FullGetParameters(const StateDictOptions& options,
                                const std::vector<Holder>& destinations) {
  DigestBuilder parameters;
  parameters.Add("get")
      .Add(static_cast<int64_t>(options.cpu_offload))
      .Add(destinations);
  return parameters;
}

std::string DescribeFullGet(const StateDictOptions& options,
                            const std::vector<Holder>& destinations) {
  return absl::StrCat("cpu_offload = ", options.cpu_offload ? "true" : "false",
                      " for the ranks [", absl::StrJoin(destinations, ", "),
                      "]");
}

// A tensor, or elements [begin, end) of it, or an object if `tensor` is null.
struct Piece {
  Path path;
  const Value* value;
  const TensorValue* tensor;
  int64_t begin = 0;
  int64_t end = 0;
  bool is_whole = true;
};

// Everything in `root`, in order, cut so that no piece is over `max_bytes` (or
// one element).
absl::StatusOr<std::vector<Piece>> CutIntoPieces(const Value& root,
                                                 int64_t max_bytes) {
  std::vector<Piece> pieces;
  absl::Status status;
  VisitLeaves<TensorValue>(root, [&](const Path& path, const Value& value) {
    const auto* tensor = value.get_if<TensorValue>();
    if (tensor == nullptr) {
      pieces.push_back({path, &value, nullptr});
      return;
    }
    if (!tensor->defined()) {
      status.Update(absl::InvalidArgumentError(
          absl::StrCat("\"", JoinPath(path), "\": the tensor is undefined")));
      return;
    }
    const absl::StatusOr<DType> dtype = ToDType(tensor->scalar_type());
    if (!dtype.ok()) {
      status.Update(
          Annotate(dtype.status(), absl::StrCat("\"", JoinPath(path), "\"")));
      return;
    }
    const int64_t total = Box::Whole(tensor->shape()).num_elements();
    const int64_t step = std::max<int64_t>(1, max_bytes / ItemSize(*dtype));
    if (total <= step) {
      pieces.push_back({path, &value, tensor, 0, total});
      return;
    }
    for (int64_t begin = 0; begin < total; begin += step) {
      pieces.push_back({path, &value, tensor, begin,
                        std::min(begin + step, total), /*is_whole=*/false});
    }
  });
  DSD_RETURN_IF_ERROR(status);
  return pieces;
}

int64_t BytesOf(const Piece& piece) {
  return piece.tensor == nullptr ? 0
                                 : (piece.end - piece.begin) *
                                       static_cast<int64_t>(c10::elementSize(
                                           piece.tensor->scalar_type()));
}

absl::Status AddToBatch(const Piece& piece, const StateDictOptions& options,
                        const std::vector<Holder>& destinations, Holder self,
                        TensorEndpoint& source, TensorEndpoint& target,
                        at::Tensor* out) {
  const std::string name = JoinPath(piece.path);
  const TensorValue& tensor = *piece.tensor;
  DSD_RETURN_IF_ERROR(source.Add(name, tensor));
  DSD_ASSIGN_OR_RETURN(const DType dtype, ToDType(tensor.scalar_type()));
  absl::Span<const at::Tensor> locals;
  if (std::binary_search(destinations.begin(), destinations.end(), self)) {
    DSD_ASSIGN_OR_RETURN(
        *out, NewTensor(piece.is_whole ? tensor.shape()
                                       : Dims{piece.end - piece.begin},
                        ResultOptions(options, tensor)));
    locals = absl::MakeConstSpan(out, 1);
  }
  if (piece.is_whole) {
    DSD_ASSIGN_OR_RETURN(Layout layout,
                         target.ReplicatedLayout(tensor.shape()));
    return target.Add({name, dtype, std::move(layout)}, self, locals);
  }
  std::vector<FlatInterval> intervals;
  for (const Holder holder : destinations) {
    intervals.push_back({holder, piece.begin, piece.end});
  }
  DSD_ASSIGN_OR_RETURN(
      Layout layout,
      Layout::FromFlatIntervals(tensor.shape(), std::move(intervals)));
  return target.Add({name, dtype, std::move(layout)}, self, locals);
}

}  // namespace

absl::StatusOr<std::vector<Holder>> Destinations(
    const StateDictOptions& options, const Mover& mover) {
  std::vector<Holder> holders;
  if (options.full_state_dict_ranks.has_value()) {
    for (const int rank : *options.full_state_dict_ranks) {
      if (rank < 0 || rank >= mover.world_size()) {
        return absl::InvalidArgumentError(
            absl::StrCat("full_state_dict_ranks: there is no rank ", rank,
                         " in a world of ", mover.world_size()));
      }
      holders.push_back(mover.comm() == nullptr ? mover.self() : rank);
    }
    if (holders.empty()) {
      return absl::InvalidArgumentError(
          "full_state_dict_ranks is empty: name the ranks that are to receive "
          "the state");
    }
    std::sort(holders.begin(), holders.end());
    holders.erase(std::unique(holders.begin(), holders.end()), holders.end());
    return holders;
  }
  if (mover.comm() == nullptr) return std::vector<Holder>{mover.self()};
  const int count = options.cpu_offload ? 1 : mover.world_size();
  for (int rank = 0; rank < count; ++rank) holders.push_back(rank);
  return holders;
}

absl::Status Deliver(absl::Status local, const StateDictOptions& options,
                     Mover& mover, const CallClock& clock, StateDict& root) {
  if (!options.full_state_dict && options.full_state_dict_ranks.has_value()) {
    return absl::InvalidArgumentError(
        "full_state_dict_ranks needs full_state_dict = true: shards stay where "
        "they are");
  }
  if (!options.full_state_dict && !options.cpu_offload) return local;
  std::vector<Holder> destinations = {mover.self()};
  if (options.full_state_dict) {
    absl::StatusOr<std::vector<Holder>> ranks = Destinations(options, mover);
    local.Update(ranks.status());
    if (ranks.ok()) destinations = *std::move(ranks);
  }
  Delivery delivery(options, mover, destinations);
  if (local.ok()) local = delivery.Collect(root);
  if (!options.full_state_dict) {
    DSD_RETURN_IF_ERROR(local);
    DSD_RETURN_IF_ERROR(
        mover.MoveLocally(delivery.source(), delivery.target(), clock))
        << "copy the state to host memory";
    delivery.Replace();
    return absl::OkStatus();
  }
  bool changed = false;
  DSD_RETURN_IF_ERROR(mover.Move(
      "full get", delivery.source(), delivery.target(),
      FullGetParameters(options, destinations).Finish(),
      [&] { return DescribeFullGet(options, destinations); }, local, clock,
      &changed));
  if (!delivery.receives()) {
    root = StateDict();
    return absl::OkStatus();
  }
  delivery.Replace();
  return absl::OkStatus();
}

absl::Status Stream(absl::Status local, const StateDictOptions& options,
                    const StreamOptions& stream, Mover& mover,
                    const CallClock& clock, const StateDict& root,
                    StreamVisitor visit) {
  StateDictOptions full = options;
  full.full_state_dict = true;
  std::vector<Holder> destinations = {mover.self()};
  absl::StatusOr<std::vector<Holder>> ranks = Destinations(full, mover);
  local.Update(ranks.status());
  if (ranks.ok()) destinations = *std::move(ranks);
  const bool receives = std::binary_search(destinations.begin(),
                                           destinations.end(), mover.self());
  const Value tree{StateDict(root)};
  std::vector<Piece> pieces;
  if (local.ok()) {
    absl::StatusOr<std::vector<Piece>> cut =
        CutIntoPieces(tree, stream.batch_bytes);
    local.Update(cut.status());
    if (cut.ok()) pieces = *std::move(cut);
  }
  const Digest parameters =
      FullGetParameters(options, destinations).Add(stream.batch_bytes).Finish();
  size_t next = 0;
  do {
    size_t end = next;
    int64_t bytes = 0;
    TensorEndpoint source = mover.NewEndpoint();
    TensorEndpoint target(
        *DeviceMesh::Create({static_cast<int64_t>(destinations.size())},
                            destinations),
        mover.self());
    std::vector<at::Tensor> tensors;
    for (; local.ok() && end < pieces.size() &&
           (end == next || bytes + BytesOf(pieces[end]) <= stream.batch_bytes);
         ++end) {
      bytes += BytesOf(pieces[end]);
      tensors.emplace_back();
      if (pieces[end].tensor == nullptr) continue;
      local =
          Annotate(AddToBatch(pieces[end], options, destinations, mover.self(),
                              source, target, &tensors.back()),
                   absl::StrCat("\"", JoinPath(pieces[end].path), "\""));
    }
    bool changed = false;
    DSD_RETURN_IF_ERROR(mover.Move(
        "stream the state", source, target, parameters,
        [&] {
          return absl::StrCat(DescribeFullGet(options, destinations),
                              ", batch_bytes = ", stream.batch_bytes);
        },
        local, clock, &changed));
    mover.ForgetPlan();
    for (; next < end; ++next) {
      if (!receives || !local.ok()) continue;
      const Piece& piece = pieces[next];
      at::Tensor& tensor = tensors[tensors.size() - (end - next)];
      StreamedValue streamed{piece.path, JoinPath(piece.path)};
      streamed.value = piece.tensor == nullptr
                           ? *piece.value
                           : Value(TensorValue(std::move(tensor)));
      if (piece.tensor != nullptr) streamed.shape = piece.tensor->shape();
      streamed.begin = piece.begin;
      streamed.end = piece.end;
      streamed.is_whole = piece.is_whole;
      local = Annotate(TorchToStatus([&] { return visit(streamed); }),
                       absl::StrCat("\"", streamed.key, "\""));
    }
  } while (next < pieces.size());
  return Agree(
      mover.comm(), "stream the state", Digest(), local,
      [] { return std::string(); }, clock.Left());
}

}  // namespace dsd
