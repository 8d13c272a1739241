// Memory that a thread keeps between calls: it grows to the largest call and stays there.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace streamo {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // At least `bytes`, aligned to 64; what it held before is lost. Throws std::bad_alloc.
  void* reserve(std::size_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (memory_ == nullptr) throw std::bad_alloc();
      bytes_ = (bytes + 63) / 64 * 64;
    }
    return memory_;
  }

  template <typename T>
  T* reserve_of(std::size_t count) {
    return static_cast<T*>(reserve(count * sizeof(T)));
  }

 private:
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace streamo
