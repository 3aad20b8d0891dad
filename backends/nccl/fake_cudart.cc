// SPDX-License-Identifier: Apache-2.0
//
// A CUDA runtime for tests on machines without a GPU: memory of a device is
// memory of the host, a stream is a thread that works in order, and a kernel is
// what cudaLaunchHostFunc brings. It answers misuse as CUDA would, or aborts
// where CUDA would do something undefined.
//
// DSD_FAKE_CUDA_DEVICES: how many devices there are; 8 if unset.

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kMemoryAllocation = 2;
constexpr int kNoDevice = 100;
constexpr int kInvalidDevice = 101;
constexpr int kInvalidHandle = 400;
constexpr int kNotReady = 600;

thread_local int current_device = 0;
thread_local int last_error = kSuccess;

int Result(int result) {
  if (result != kSuccess) last_error = result;
  return result;
}

int Devices() {
  const char* const text = getenv("DSD_FAKE_CUDA_DEVICES");
  return text == nullptr ? 8 : atoi(text);
}

class Stream {
 public:
  explicit Stream(int device) : device_(device) {
    thread_ = std::thread([this] { Work(); });
  }
  ~Stream() {
    {
      const std::lock_guard<std::mutex> lock(mu_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void Push(std::function<void()> task) {
    {
      const std::lock_guard<std::mutex> lock(mu_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_all();
  }

  bool IsIdle() {
    const std::lock_guard<std::mutex> lock(mu_);
    return tasks_.empty();
  }

  void Synchronize() {
    std::unique_lock<std::mutex> lock(mu_);
    changed_.wait(lock, [this] { return tasks_.empty(); });
  }

  int device() const { return device_; }

 private:
  void Work() {
    std::unique_lock<std::mutex> lock(mu_);
    while (true) {
      changed_.wait(lock, [this] { return ending_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = tasks_.front();
      lock.unlock();
      task();
      lock.lock();
      tasks_.pop_front();
      changed_.notify_all();
    }
  }

  const int device_;
  std::mutex mu_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;  // the first is being done
  bool ending_ = false;
  std::thread thread_;
};

struct Event {
  int device = 0;
  std::mutex mu;
  // Guarded by mu; null: never recorded. The stream sets it, perhaps after the
  // event is destroyed.
  std::shared_ptr<std::atomic<bool>> reached;
};

struct Block {
  size_t size;
  int device;
};

struct Memory {
  std::mutex mu;
  std::map<const char*, Block> blocks;
};
Memory& AllMemory() {
  static auto* const memory = new Memory;
  return *memory;
}

// Of each device, never destroyed.
Stream& DefaultStream() {
  static auto* const mu = new std::mutex;
  static auto* const streams = new std::map<int, Stream*>;
  const std::lock_guard<std::mutex> lock(*mu);
  Stream*& stream = (*streams)[current_device];
  if (stream == nullptr) stream = new Stream(current_device);
  return *stream;
}

Stream& StreamOf(void* handle) {
  return handle == nullptr ? DefaultStream() : *static_cast<Stream*>(handle);
}

}  // namespace

extern "C" {

struct cudaPointerAttributes {
  int type;
  int device;
  void* devicePointer;
  void* hostPointer;
};

int cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}

int cudaGetDeviceCount(int* count) {
  *count = Devices();
  return Result(*count == 0 ? kNoDevice : kSuccess);
}

int cudaGetDevice(int* device) {
  *device = current_device;
  return Result(Devices() == 0 ? kNoDevice : kSuccess);
}

int cudaSetDevice(int device) {
  if (device < 0 || device >= Devices()) return Result(kInvalidDevice);
  current_device = device;
  return kSuccess;
}

const char* cudaGetErrorString(int error) {
  switch (error) {
    case kSuccess:
      return "no error";
    case kNoDevice:
      return "no CUDA-capable device is detected";
    case kInvalidDevice:
      return "invalid device ordinal";
    case kInvalidHandle:
      return "invalid resource handle";
    case kNotReady:
      return "device not ready";
    default:
      return "another error";
  }
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}

int cudaMalloc(void** memory, size_t bytes) {
  *memory = aligned_alloc(512, (bytes + 511) / 512 * 512);
  if (*memory == nullptr) return Result(kMemoryAllocation);
  Memory& all = AllMemory();
  const std::lock_guard<std::mutex> lock(all.mu);
  all.blocks[static_cast<const char*>(*memory)] = {bytes, current_device};
  return kSuccess;
}

int cudaFree(void* memory) {
  if (memory == nullptr) return kSuccess;
  Memory& all = AllMemory();
  {
    const std::lock_guard<std::mutex> lock(all.mu);
    if (all.blocks.erase(static_cast<const char*>(memory)) == 0) {
      return Result(kInvalidValue);
    }
  }
  free(memory);
  return kSuccess;
}

int cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                             const void* pointer) {
  const char* const at = static_cast<const char*>(pointer);
  *attributes = {0, -2, nullptr, const_cast<void*>(pointer)};
  Memory& all = AllMemory();
  const std::lock_guard<std::mutex> lock(all.mu);
  auto it = all.blocks.upper_bound(at);
  if (it == all.blocks.begin()) return kSuccess;
  --it;
  if (at < it->first + it->second.size) {
    *attributes = {2, it->second.device, const_cast<void*>(pointer), nullptr};
  }
  return kSuccess;
}

int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}

int cudaStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  if (flags > 1 || priority > 0 || priority < -5) return Result(kInvalidValue);
  *stream = new Stream(current_device);
  return kSuccess;
}

int cudaStreamDestroy(void* stream) {
  delete static_cast<Stream*>(stream);
  return kSuccess;
}

int cudaStreamQuery(void* stream) {
  return Result(StreamOf(stream).IsIdle() ? kSuccess : kNotReady);
}

int cudaStreamSynchronize(void* stream) {
  StreamOf(stream).Synchronize();
  return kSuccess;
}

int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  StreamOf(stream).Push([=] { function(argument); });
  return kSuccess;
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int /*kind*/,
                    void* stream) {
  StreamOf(stream).Push([=] { memcpy(to, from, bytes); });
  return kSuccess;
}

int cudaMemsetAsync(void* to, int value, size_t bytes, void* stream) {
  StreamOf(stream).Push([=] { memset(to, value, bytes); });
  return kSuccess;
}

int cudaEventCreateWithFlags(void** event, unsigned flags) {
  if (flags > 7) return Result(kInvalidValue);
  auto* const made = new Event;
  made->device = current_device;
  *event = made;
  return kSuccess;
}

int cudaEventDestroy(void* event) {
  delete static_cast<Event*>(event);
  return kSuccess;
}

int cudaEventRecord(void* handle, void* stream) {
  Event& event = *static_cast<Event*>(handle);
  if (event.device != StreamOf(stream).device()) return Result(kInvalidHandle);
  const auto reached = std::make_shared<std::atomic<bool>>(false);
  {
    const std::lock_guard<std::mutex> lock(event.mu);
    event.reached = reached;
  }
  StreamOf(stream).Push([reached] { *reached = true; });
  return kSuccess;
}

int cudaEventQuery(void* handle) {
  Event& event = *static_cast<Event*>(handle);
  const std::lock_guard<std::mutex> lock(event.mu);
  return Result(event.reached == nullptr || *event.reached ? kSuccess
                                                           : kNotReady);
}

}  // extern "C"
