// SPDX-License-Identifier: Apache-2.0
//
// A program of somebody else's: one tensor from rows to columns, and the backends
// that its build chose.

#include <cstddef>
#include <iostream>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "xxhash.h"

#ifndef EMBEDDER_XXHASH
#error "dsd brought its own xxhash although this workspace has one"
#endif

namespace {

absl::Status Run() {
  const auto mesh = dsd::DeviceMesh::Iota({1});
  const dsd::Placement rows[] = {dsd::Shard(0)};
  const dsd::Placement columns[] = {dsd::Shard(1)};
  const auto from = dsd::Layout::FromPlacements({2, 3}, mesh, rows);
  const auto to = dsd::Layout::FromPlacements({2, 3}, mesh, columns);
  if (!from.ok()) return from.status();
  if (!to.ok()) return to.status();

  std::vector<float> in = {1, 2, 3, 4, 5, 6};
  std::vector<float> out(6);
  dsd::MemoryEndpoint source;
  dsd::MemoryEndpoint target;
  absl::Status status =
      source.AddLocal({"w", dsd::DType::kFloat32, *from}, 0,
                      reinterpret_cast<std::byte*>(in.data()));
  status.Update(target.AddLocal({"w", dsd::DType::kFloat32, *to}, 0,
                                reinterpret_cast<std::byte*>(out.data())));
  if (!status.ok()) return status;
  const auto stats = dsd::Redistribute(source, target, nullptr);
  if (!stats.ok()) return stats.status();
  return in == out ? absl::OkStatus() : absl::InternalError("wrong elements");
}

}  // namespace

int main() {
  const absl::Status status = Run();
  std::cout << "backends:";
  for (const std::string& name : dsd::LinkedBackends()) std::cout << ' ' << name;
  std::cout << "\nstatus: " << status << "\n";
  return status.ok() ? 0 : 1;
}
