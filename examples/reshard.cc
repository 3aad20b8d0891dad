// SPDX-License-Identifier: Apache-2.0
//
// Moves a set of tensors from a layout over 4 ranks to a layout over 2 ranks,
// in one process: each rank is a thread. Prints what the planner decided, what
// the executor moved, and checks every element.
//
//   ./bazelw run //examples:reshard

#include <cstdint>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/core/transfer/transfer.h"

namespace {

using dsd::Dims;
using dsd::DType;
using dsd::Layout;
using dsd::Replicate;
using dsd::Shard;

constexpr int kRanks = 4;

struct Named {
  std::string fqn;
  Layout from;  // over ranks 0 .. 3
  Layout to;    // over ranks 0 and 1
};

absl::StatusOr<std::vector<Named>> MakeTensors() {
  const auto four = dsd::DeviceMesh::Iota({4}, 0, {"dp"});
  const auto square = dsd::DeviceMesh::Iota({2, 2}, 0, {"dp", "tp"});
  const auto two = dsd::DeviceMesh::Iota({2}, 0, {"dp"});

  std::vector<Named> tensors;
  // Rows over 4 ranks, unevenly (3, 3, 3, 1), to rows over 2.
  DSD_ASSIGN_OR_RETURN(Layout a,
                       Layout::FromPlacements({10, 6}, four, {Shard(0)}));
  DSD_ASSIGN_OR_RETURN(Layout b,
                       Layout::FromPlacements({10, 6}, two, {Shard(0)}));
  tensors.push_back({"embedding.weight", a, b});
  // FSDP over tensor parallelism to columns over 2 ranks.
  DSD_ASSIGN_OR_RETURN(
      a, Layout::FromPlacements({8, 8}, square,
                                {dsd::StridedShard(0, 2), Shard(0)}));
  DSD_ASSIGN_OR_RETURN(b, Layout::FromPlacements({8, 8}, two, {Shard(1)}));
  tensors.push_back({"attention.weight", a, b});
  // Everywhere to everywhere: nothing moves.
  DSD_ASSIGN_OR_RETURN(
      a, Layout::FromPlacements({16}, square, {Replicate(), Replicate()}));
  DSD_ASSIGN_OR_RETURN(b, Layout::FromPlacements({16}, two, {Replicate()}));
  tensors.push_back({"norm.weight", a, b});
  // A flat parameter, cut without regard to rows, to rows.
  DSD_ASSIGN_OR_RETURN(
      a, Layout::FromFlatIntervals(
             {5, 7}, {{0, 0, 9}, {1, 9, 18}, {2, 18, 27}, {3, 27, 35}}));
  DSD_ASSIGN_OR_RETURN(b, Layout::FromPlacements({5, 7}, two, {Shard(0)}));
  tensors.push_back({"mlp.flat_param", a, b});
  return tensors;
}

// One rank's side of all tensors, with memory of its own. Element i of tensor t
// has the value 1000 * t + i in its source.
struct Side {
  dsd::MemoryEndpoint endpoint;
  std::vector<std::vector<float>> buffers;
};

int64_t LocalElements(const Layout& layout, int rank) {
  int64_t elements = 0;
  for (const dsd::LocalBox& piece : layout.BoxesOf(rank)) {
    elements += piece.box.num_elements();
  }
  return elements;
}

// Calls visit(value, expected) for each element of the rank's part.
template <class Visit>
absl::Status ForEachElement(Side& side, int rank, Visit visit) {
  const dsd::Catalog& catalog = side.endpoint.catalog();
  for (size_t t = 0; t < catalog.size(); ++t) {
    const Layout& layout = catalog[t].layout;
    for (const dsd::LocalBox& piece : layout.BoxesOf(rank)) {
      const auto view = side.endpoint.View(t, piece.box);
      if (!view.has_value()) return absl::InternalError("box without memory");
      Dims at(piece.box.lo);
      for (int64_t n = piece.box.num_elements(); n > 0; --n) {
        std::byte* address = view->base;
        for (int d = 0; d < piece.box.ndim(); ++d) {
          address += (at[d] - piece.box.lo[d]) * view->strides_bytes[d];
        }
        visit(
            *reinterpret_cast<float*>(address),
            static_cast<float>(1000 * t + dsd::FlatIndex(layout.shape(), at)));
        for (int d = piece.box.ndim() - 1; d >= 0; --d) {
          if (++at[d] < piece.box.hi[d]) break;
          at[d] = piece.box.lo[d];
        }
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Side>> MakeSide(
    const std::vector<Named>& tensors, int rank, bool source) {
  auto side = std::make_unique<Side>();
  for (const Named& tensor : tensors) {
    const Layout& layout = source ? tensor.from : tensor.to;
    side->buffers.emplace_back(LocalElements(layout, rank), -1.0f);
    DSD_RETURN_IF_ERROR(side->endpoint.AddLocal(
        {tensor.fqn, DType::kFloat32, layout}, rank,
        reinterpret_cast<std::byte*>(side->buffers.back().data())));
  }
  return side;
}

struct Outcome {
  absl::Status status;
  dsd::Plan plan;
  dsd::TransferStats stats;
  int64_t elements_right = 0;
  int64_t elements_wrong = 0;
};

absl::Status RunRank(int rank, const std::vector<Named>& tensors,
                     std::shared_ptr<dsd::Store> store, Outcome& outcome) {
  dsd::CommunicatorOptions options;
  options.rank = rank;
  options.world_size = kRanks;
  options.backend = "local";
  options.store = std::move(store);
  DSD_ASSIGN_OR_RETURN(auto comm, dsd::Communicator::Create(options));

  DSD_ASSIGN_OR_RETURN(auto source, MakeSide(tensors, rank, true));
  DSD_ASSIGN_OR_RETURN(auto target, MakeSide(tensors, rank, false));
  DSD_RETURN_IF_ERROR(ForEachElement(
      *source, rank, [](float& value, float expected) { value = expected; }));

  const dsd::Binding binding(kRanks);
  const dsd::Catalog& from = source->endpoint.catalog();
  const dsd::Catalog& to = target->endpoint.catalog();
  DSD_ASSIGN_OR_RETURN(
      outcome.plan, dsd::PlanForRank(rank, from, to, dsd::MatchByName(from, to),
                                     binding, binding));
  DSD_ASSIGN_OR_RETURN(outcome.stats,
                       dsd::Transfer(outcome.plan, source->endpoint,
                                     target->endpoint, comm.get()));
  DSD_RETURN_IF_ERROR(
      ForEachElement(*target, rank, [&](float& value, float expected) {
        ++(value == expected ? outcome.elements_right : outcome.elements_wrong);
      }));
  return comm->Shutdown();
}

absl::Status Run() {
  DSD_ASSIGN_OR_RETURN(const std::vector<Named> tensors, MakeTensors());
  std::cout << "tensors\n";
  dsd::Catalog from;
  dsd::Catalog to;
  for (const Named& tensor : tensors) {
    std::cout << absl::StreamFormat("  %-18s %s\n  %-18s   -> %s\n", tensor.fqn,
                                    tensor.from.ToString(), "",
                                    tensor.to.ToString());
    DSD_RETURN_IF_ERROR(from.Add({tensor.fqn, DType::kFloat32, tensor.from}));
    DSD_RETURN_IF_ERROR(to.Add({tensor.fqn, DType::kFloat32, tensor.to}));
  }

  const auto store = dsd::MakeInProcessStore(dsd::Env::Real());
  std::vector<Outcome> outcomes(kRanks);
  {
    std::vector<std::unique_ptr<dsd::EnvThread>> threads;
    for (int rank = 0; rank < kRanks; ++rank) {
      threads.push_back(dsd::Env::Real()->StartThread(
          absl::StrCat("rank ", rank), [rank, &tensors, &store, &outcomes] {
            outcomes[rank].status =
                RunRank(rank, tensors, store, outcomes[rank]);
          }));
      if (threads.back() == nullptr) {
        outcomes[rank].status = dsd::NoThread(absl::StrCat("rank ", rank));
      }
    }
  }

  std::vector<dsd::Plan> plans;
  for (const Outcome& outcome : outcomes) {
    DSD_RETURN_IF_ERROR(outcome.status);
    plans.push_back(outcome.plan);
  }
  std::cout << "\n" << dsd::Explain(from, to, plans) << "\ndone\n";
  int64_t wrong = 0;
  for (int rank = 0; rank < kRanks; ++rank) {
    const Outcome& outcome = outcomes[rank];
    std::cout << absl::StreamFormat(
        "  rank %d: sent %4d B, received %4d B, copied %4d B; %3d elements "
        "right, %d wrong\n",
        rank, outcome.stats.bytes_sent, outcome.stats.bytes_received,
        outcome.stats.bytes_local, outcome.elements_right,
        outcome.elements_wrong);
    wrong += outcome.elements_wrong;
  }
  return wrong == 0 ? absl::OkStatus()
                    : absl::InternalError("elements are wrong");
}

}  // namespace

int main() {
  const absl::Status status = Run();
  if (!status.ok()) std::cerr << "error: " << status << "\n";
  return status.ok() ? 0 : 1;
}
