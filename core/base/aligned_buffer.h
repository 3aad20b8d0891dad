// SPDX-License-Identifier: Apache-2.0

#ifndef DSD_CORE_BASE_ALIGNED_BUFFER_H_
#define DSD_CORE_BASE_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace dsd {

// Memory that begins at a page, not initialized; for reading and writing files
// past the page cache. data() is null if there is not so much. Movable.
class AlignedBuffer {
 public:
  static constexpr int64_t kAlignment = 4096;

  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t size_bytes)
      : memory_(static_cast<std::byte*>(
            ::operator new[](static_cast<size_t>(size_bytes),
                             std::align_val_t(kAlignment), std::nothrow))),
        size_bytes_(memory_ == nullptr ? 0 : size_bytes) {}

  std::byte* data() { return memory_.get(); }
  const std::byte* data() const { return memory_.get(); }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  struct Delete {
    void operator()(std::byte* memory) const {
      ::operator delete[](memory, std::align_val_t(kAlignment));
    }
  };

  std::unique_ptr<std::byte[], Delete> memory_;
  int64_t size_bytes_ = 0;
};

}  // namespace dsd

#endif  // DSD_CORE_BASE_ALIGNED_BUFFER_H_
