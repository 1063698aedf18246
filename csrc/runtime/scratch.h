// Memory that a thread keeps between calls: fresh pages from the system cost as much as a small convolution.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace patchsparse {

class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    // Return at least `count` elements, 64-byte aligned; what was there before is lost. Throw bad_alloc without memory.
    template <class T>
    T* get(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(64, bytes);
            size_ = memory_ == nullptr ? 0 : bytes;
            if (memory_ == nullptr) throw std::bad_alloc();
        }
        return static_cast<T*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace patchsparse
