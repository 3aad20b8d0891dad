// SPDX-License-Identifier: Apache-2.0
//
// What NCCL does not do, and what this backend therefore does: it moves no host
// memory (another engine, the companion, does); it has no names for messages
// and believes any size (NcclLane lets both sides say what comes before NCCL
// hears of it); it has no deadlines, and does not notice a peer that dies (all
// waits are polls, and Cancel aborts).

#include "dsd/backends/nccl/nccl_backend.h"

#include <stdlib.h>

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/nccl/cuda_api.h"
#include "dsd/backends/nccl/nccl_api.h"
#include "dsd/backends/nccl/nccl_lane.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/launch.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/comm/store.h"

namespace dsd {
namespace {

constexpr char kName[] = "nccl";
constexpr char kCompanionVariable[] = "DSD_NCCL_COMPANION";
constexpr char kDeviceVariable[] = "DSD_NCCL_DEVICE";
constexpr absl::string_view kPreferredCompanion = "gloo";

// That of the lane that needs no OpenLane.
constexpr uint64_t kMainLane = 0;

std::string Variable(const char* name) {
  const char* const value = getenv(name);
  return value == nullptr ? "" : value;
}

absl::Status CancelledStatus() { return absl::AbortedError("cancelled"); }

absl::StatusOr<int> CountDevices(const CudaApi& cuda) {
  int count = 0;
  DSD_RETURN_IF_ERROR(cuda.Check(cuda.GetDeviceCount(&count), "count devices"));
  if (count == 0) return absl::FailedPreconditionError("there is no device");
  return count;
}

// The device of this rank: the one that is asked for; else the current one, if
// the program has chosen it; else the one that the launcher's place on this
// host stands for.
absl::StatusOr<int> ChooseDevice(const CudaApi& cuda) {
  absl::StatusOr<int> count = CountDevices(cuda);
  if (!count.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("no CUDA device can be used: ", count.status().message()));
  }
  if (const std::string chosen = Variable(kDeviceVariable); !chosen.empty()) {
    int device = -1;
    if (!absl::SimpleAtoi(chosen, &device) || device < 0 || device >= *count) {
      return absl::InvalidArgumentError(
          absl::StrCat(kDeviceVariable, "=", chosen, ": expected 0 to ",
                       *count - 1, ", the devices of this process"));
    }
    return device;
  }
  int current = 0;
  DSD_RETURN_IF_ERROR(cuda.Check(cuda.GetDevice(&current), "current device"));
  if (current != 0) return current;
  int local_rank = 0;
  if (!absl::SimpleAtoi(Variable("LOCAL_RANK"), &local_rank)) {
    // Slurm and MPI have names of their own.
    const absl::StatusOr<LaunchInfo> launch =
        LaunchFromEnvironment(ProcessEnvironment());
    if (launch.ok()) local_rank = launch->local_rank;
  }
  return local_rank > 0 ? local_rank % *count : current;
}

absl::StatusOr<const BackendDescriptor*> FindCompanion() {
  const auto fits = [](const BackendDescriptor& backend) {
    return backend.host_memory && backend.name != kName;
  };
  if (const std::string name = Variable(kCompanionVariable); !name.empty()) {
    const auto found = FindBackend(name);
    DSD_RETURN_IF_ERROR(found) << kCompanionVariable << "=" << name;
    if (!fits(**found)) {
      return absl::InvalidArgumentError(
          absl::StrCat(kCompanionVariable, "=", name,
                       ": not a backend that carries host memory for NCCL"));
    }
    return *found;
  }
  // The default of the build, if it is one that can.
  if (const auto found = FindBackend("");
      found.ok() && fits(**found) && !(*found)->in_process) {
    return *found;
  }
  const BackendDescriptor* best = nullptr;
  const auto rank = [](const BackendDescriptor& backend) {
    return (backend.in_process ? 0 : 1) +
           (backend.name == kPreferredCompanion ? 2 : 0);
  };
  for (const BackendDescriptor* backend : LinkedDescriptors()) {
    if (!fits(*backend)) continue;
    if (best == nullptr || rank(*backend) > rank(*best)) best = backend;
  }
  if (best == nullptr) {
    return absl::NotFoundError(absl::StrCat(
        "backend \"nccl\" needs another one for host memory, and none is "
        "linked (linked: ",
        absl::StrJoin(LinkedBackends(), ", "),
        "); add //backends/gloo to deps"));
  }
  return best;
}

class NcclEngine final : public Engine {
 public:
  NcclEngine(const EngineOptions& options, std::unique_ptr<Engine> companion)
      : options_(options), companion_(std::move(companion)) {}

  ~NcclEngine() override {
    for (auto& [id, lane] : lanes_) {
      // Its thread may still come back to it.
      if (!lane->Close()) lane.release();
    }
  }

  absl::Status Connect(absl::Time deadline) override;
  absl::Status OpenLane(uint64_t lane, absl::Time deadline) override;
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override;
  void Cancel() override;

 private:
  class Batch;

  absl::Status CheckMemory(const void* data, size_t size) const;
  absl::StatusOr<NcclLane*> FindLane(uint64_t lane);

  const EngineOptions options_;
  const std::unique_ptr<Engine> companion_;  // null in a world of one

  // Set by Connect.
  const CudaApi* cuda_ = nullptr;
  const NcclApi* nccl_ = nullptr;
  int device_ = -1;

  absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  absl::flat_hash_map<uint64_t, std::unique_ptr<NcclLane>> lanes_
      ABSL_GUARDED_BY(mu_);
};

class NcclEngine::Batch final : public EngineBatch {
 public:
  Batch(NcclEngine* engine, NcclLane* lane) : engine_(engine), lane_(lane) {}

  ~Batch() override {
    // In this order, so that both let go at once.
    if (device_ != nullptr && !device_is_done_) engine_->Cancel();
    host_.reset();
    if (device_ != nullptr) lane_->Release(std::move(device_));
  }

  absl::Status Wait(absl::Time deadline) override {
    if (host_ != nullptr) DSD_RETURN_IF_ERROR(host_->Wait(deadline));
    return WaitForDevice(deadline);
  }

  absl::Status WaitReceived(size_t index, absl::Time deadline) override {
    if (host_index_[index] == kDevice) return WaitForDevice(deadline);
    return host_->WaitReceived(host_index_[index], deadline);
  }

 private:
  friend class NcclEngine;
  static constexpr size_t kDevice = ~size_t{0};

  absl::Status WaitForDevice(absl::Time deadline) {
    if (device_ == nullptr || device_is_done_) return absl::OkStatus();
    DSD_RETURN_IF_ERROR(lane_->Wait(*device_, deadline));
    device_is_done_ = true;
    return absl::OkStatus();
  }

  NcclEngine* const engine_;
  NcclLane* const lane_;
  std::vector<size_t> host_index_;  // of each receive, or kDevice
  std::unique_ptr<EngineBatch> host_;
  std::unique_ptr<NcclTransfer> device_;
  bool device_is_done_ = false;
};

absl::Status NcclEngine::Connect(absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(cuda_, LoadCuda());
  DSD_ASSIGN_OR_RETURN(nccl_, LoadNccl());
  DSD_ASSIGN_OR_RETURN(device_, ChooseDevice(*cuda_));
  // First, since it names ranks that are absent.
  if (companion_ != nullptr) {
    DSD_RETURN_IF_ERROR(companion_->Connect(deadline));
  }
  return OpenLane(kMainLane, deadline);
}

absl::Status NcclEngine::OpenLane(uint64_t id, absl::Time deadline) {
  NcclLane::Options options;
  options.cuda = cuda_;
  options.nccl = nccl_;
  options.device = device_;
  options.rank = options_.rank;
  options.world_size = options_.world_size;
  options.lane = id;
  options.env = options_.env;
  options.store = options_.store.get();
  options.companion = companion_.get();
  NcclLane* lane;
  {
    absl::MutexLock lock(&mu_);
    if (cancelled_) return CancelledStatus();
    auto [it, is_new] = lanes_.try_emplace(id);
    if (!is_new) {
      return absl::InternalError(
          absl::StrCat("lane ", absl::Hex(id), " is open already"));
    }
    it->second = std::make_unique<NcclLane>(options);
    lane = it->second.get();
  }
  DSD_RETURN_IF_ERROR(lane->Open(deadline))
      << "NCCL " << NcclVersionText(nccl_->version) << " on device " << device_;
  return absl::OkStatus();
}

// Communicator's first lane has a number, but no OpenLane.
absl::StatusOr<NcclLane*> NcclEngine::FindLane(uint64_t id) {
  absl::MutexLock lock(&mu_);
  if (cancelled_) return CancelledStatus();
  auto it = lanes_.find(id);
  if (it == lanes_.end()) it = lanes_.find(kMainLane);
  if (it == lanes_.end()) return absl::InternalError("not connected");
  return it->second.get();
}

// A pointer to anything else would only show as a fault on the device.
absl::Status NcclEngine::CheckMemory(const void* data, size_t size) const {
  CudaPointerAttributes memory;
  absl::Status status =
      cuda_->Check(cuda_->PointerGetAttributes(&memory, data), "memory");
  if (status.ok() && (memory.type == CudaPointerAttributes::kDevice ||
                      memory.type == CudaPointerAttributes::kManaged)) {
    if (memory.device == device_) return status;
    return absl::FailedPreconditionError(absl::StrCat(
        "a message of ", size, " bytes is in memory of device ", memory.device,
        ", but rank ", options_.rank, " uses device ", device_,
        "; make that device the current one before connecting, or name it in ",
        kDeviceVariable));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("a message of ", size,
                   " bytes is said to be in device memory, and is not",
                   status.ok() ? "" : ": ", status.message()));
}

absl::StatusOr<std::unique_ptr<EngineBatch>> NcclEngine::Start(
    absl::Span<const EngineSend> sends, absl::Span<const EngineRecv> recvs) {
  std::vector<EngineSend> host_sends;
  std::vector<EngineSend> device_sends;
  std::vector<EngineRecv> host_recvs;
  std::vector<EngineRecv> device_recvs;
  std::vector<size_t> host_index;
  uint64_t lane_id = kMainLane;
  // Both sides leave an empty message out.
  for (const EngineSend& send : sends) {
    if (send.space.type == DeviceType::kCpu) {
      host_sends.push_back(send);
    } else if (!send.data.empty()) {
      DSD_RETURN_IF_ERROR(CheckMemory(send.data.data(), send.data.size()));
      device_sends.push_back(send);
      lane_id = send.lane;
    }
  }
  for (const EngineRecv& recv : recvs) {
    if (recv.space.type == DeviceType::kCpu) {
      host_index.push_back(host_recvs.size());
      host_recvs.push_back(recv);
      continue;
    }
    host_index.push_back(Batch::kDevice);
    if (recv.data.empty()) continue;
    DSD_RETURN_IF_ERROR(CheckMemory(recv.data.data(), recv.data.size()));
    device_recvs.push_back(recv);
    lane_id = recv.lane;
  }

  DSD_ASSIGN_OR_RETURN(NcclLane* const lane, FindLane(lane_id));
  auto batch = std::make_unique<Batch>(this, lane);
  batch->host_index_ = std::move(host_index);
  if (!host_sends.empty() || !host_recvs.empty()) {
    if (companion_ == nullptr) {
      return absl::InvalidArgumentError(
          "host memory in a world of one has no way to go");
    }
    DSD_ASSIGN_OR_RETURN(batch->host_,
                         companion_->Start(host_sends, host_recvs));
  }
  if (!device_sends.empty() || !device_recvs.empty()) {
    DSD_ASSIGN_OR_RETURN(batch->device_, lane->Start(std::move(device_sends),
                                                     std::move(device_recvs)));
  }
  return batch;
}

void NcclEngine::Cancel() {
  {
    absl::MutexLock lock(&mu_);
    cancelled_ = true;
    for (auto& [id, lane] : lanes_) lane->Cancel();
  }
  if (companion_ != nullptr) companion_->Cancel();
}

absl::StatusOr<std::unique_ptr<Engine>> CreateNccl(
    const EngineOptions& options) {
  if (options.world_size == 1) {
    return std::make_unique<NcclEngine>(options, nullptr);
  }
  DSD_ASSIGN_OR_RETURN(const BackendDescriptor* const companion,
                       FindCompanion());
  return CreateNcclEngine(options, *companion);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> CreateNcclEngine(
    const EngineOptions& options, const BackendDescriptor& companion) {
  if (!companion.host_memory) {
    return absl::InvalidArgumentError(
        absl::StrCat("backend \"", companion.name,
                     "\" moves no host memory and cannot do that for NCCL"));
  }
  EngineOptions of_companion = options;
  of_companion.store = MakePrefixStore("companion", options.store);
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine,
                       companion.create(of_companion));
  EngineOptions own = options;
  own.store = MakePrefixStore(kName, options.store);
  return std::make_unique<NcclEngine>(own, std::move(engine));
}

absl::Status NcclIsAvailable(int ranks) {
  DSD_ASSIGN_OR_RETURN(const NcclApi* const nccl, LoadNccl());
  DSD_ASSIGN_OR_RETURN(const CudaApi* const cuda, LoadCuda());
  DSD_ASSIGN_OR_RETURN(const int devices, CountDevices(*cuda));
  if (ranks <= devices) return absl::OkStatus();
  if (nccl->version < kNcclVersionOfSharedDevices) {
    return absl::FailedPreconditionError(
        absl::StrCat(ranks, " ranks need ", ranks, " devices, and there are ",
                     devices, "; NCCL ", NcclVersionText(nccl->version),
                     " lets no two ranks share one, ",
                     NcclVersionText(kNcclVersionOfSharedDevices), " would"));
  }
  if (Variable("NCCL_MULTI_RANK_GPU_ENABLE") != "1") {
    return absl::FailedPreconditionError(
        absl::StrCat(ranks, " ranks share ", devices,
                     " devices, which needs NCCL_MULTI_RANK_GPU_ENABLE=1"));
  }
  return absl::OkStatus();
}

const BackendDescriptor& NcclBackend() {
  static constexpr BackendDescriptor kDescriptor = {
      /*name=*/kName,       kEngineApiVersion,
      /*host_memory=*/true, /*cuda_memory=*/true,
      /*in_process=*/false, &CreateNccl};
  return kDescriptor;
}

}  // namespace dsd
