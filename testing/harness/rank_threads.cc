// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/harness/rank_threads.h"

#include <algorithm>
#include <memory>
#include <thread>
#include <utility>

#include "dsd/backends/local/local_backend.h"
#include "dsd/core/comm/store.h"

namespace dsd {

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
      CommunicatorOptions comm_options;
      comm_options.rank = rank;
      comm_options.world_size = world_size;
      comm_options.descriptor = &LocalBackend();
      comm_options.store = store;
      comm_options.connect_timeout = options.connect_timeout;
      absl::StatusOr<std::unique_ptr<Communicator>> comm =
          Communicator::Create(comm_options);
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
