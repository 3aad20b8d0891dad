// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/harness/rank_threads.h"

#include <algorithm>
#include <memory>
#include <thread>
#include <utility>

#include "dsd/backends/local/local_backend.h"
#include "dsd/core/comm/store.h"

namespace dsd {

CommunicatorOptions RankThreadCommunicator(int rank, int world_size,
                                           std::shared_ptr<Store> store,
                                           const RankThreadsOptions& options) {
  CommunicatorOptions comm;
  comm.rank = rank;
  comm.world_size = world_size;
  comm.descriptor =
      options.descriptor != nullptr ? options.descriptor : &LocalBackend();
  comm.store = std::move(store);
  comm.bind_address = options.bind_address;
  comm.connect_timeout = options.connect_timeout;
  return comm;
}

std::vector<absl::Status> RunRankThreads(
    int world_size, absl::FunctionRef<absl::Status(Communicator& comm)> body,
    const RankThreadsOptions& options) {
  const std::shared_ptr<Store> store = MakeInProcessStore(Env::Real());
  std::vector<absl::Status> results(world_size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world_size; ++rank) {
    if (std::count(options.absent.begin(), options.absent.end(), rank) > 0) {
      continue;
    }
    threads.emplace_back([&, rank] {
      absl::StatusOr<std::unique_ptr<Communicator>> comm = Communicator::Create(
          RankThreadCommunicator(rank, world_size, store, options));
      if (!comm.ok()) {
        results[rank] = comm.status();
        return;
      }
      results[rank] = body(**comm);
      if (results[rank].ok() && options.shutdown) {
        results[rank] = (*comm)->Shutdown();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

}  // namespace dsd
