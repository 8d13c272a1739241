// Arrays side by side in one piece of scratch memory, each aligned to 64 bytes.
#pragma once

#include <cstddef>

namespace streamo {

class Carve {
 public:
  explicit Carve(void* memory) : next_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(std::size_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return array;
  }

  // What take<T>(count) will use.
  template <typename T>
  static constexpr std::size_t bytes_of(std::size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* next_;
};

}  // namespace streamo
