// SPDX-License-Identifier: Apache-2.0
//
// The backend "c10d" of tests that know backends by name only: over a process
// group that it makes itself.

#include <signal.h>
#include <stdlib.h>

#include <memory>
#include <string>
#include <utility>

#include "dsd/backends/c10d/c10d_backend.h"
#include "dsd/backends/c10d/own_group.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/comm/store.h"
#include "torch/csrc/distributed/c10d/Backend.hpp"

namespace dsd {
namespace {

class OwnGroupEngine final : public Engine {
 public:
  explicit OwnGroupEngine(const EngineOptions& options) : options_(options) {}

  absl::Status Connect(absl::Time deadline) override {
    std::string path;
    if (options_.rank == 0) {
      path = "/tmp/dsd_c10d_XXXXXX";
      if (const char* const tmp = getenv("TEST_TMPDIR")) {
        path = std::string(tmp) + "/dsd_c10d_XXXXXX";
      }
      if (mkdtemp(path.data()) == nullptr) {
        return absl::UnavailableError("mkdtemp failed");
      }
      path += "/store";
      DSD_RETURN_IF_ERROR(options_.store->Set("c10d", path, deadline));
    } else {
      DSD_ASSIGN_OR_RETURN(path, options_.store->Get("c10d", deadline));
    }
    DSD_ASSIGN_OR_RETURN(const auto group, MakeGlooGroup(path, options_.rank,
                                                         options_.world_size));
    engine_ = MakeC10dEngine(options_, group);
    return engine_->Connect(deadline);
  }
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override {
    return engine_->Start(sends, recvs);
  }
  void Cancel() override {
    if (engine_ != nullptr) engine_->Cancel();
  }

 private:
  const EngineOptions options_;
  std::unique_ptr<Engine> engine_;
};

absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options) {
  // LibTorch's Gloo writes to connections that may be closed.
  signal(SIGPIPE, SIG_IGN);
  return std::make_unique<OwnGroupEngine>(options);
}

constexpr BackendDescriptor kDescriptor = {
    /*name=*/"c10d",      kEngineApiVersion,
    /*host_memory=*/true, /*cuda_memory=*/false,
    /*in_process=*/false, &Create};

const BackendRegistration registration(kDescriptor);

}  // namespace
}  // namespace dsd
