// Running tasks on a caller's threads.
#pragma once

#include <cstddef>
#include <type_traits>

#include "streamo_kernels.h"

namespace streamo {

inline int thread_count(const streamo_threads* threads) { return threads == nullptr ? 1 : threads->count; }

// Calls body(i) for every i below `tasks`; on the calling thread alone where `threads` is null or one task is all.
template <typename Body>
void parallel_for(const streamo_threads* threads, std::size_t tasks, Body&& body) {
  if (threads == nullptr || threads->count <= 1 || tasks <= 1) {
    for (std::size_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  using Callable = std::remove_reference_t<Body>;
  threads->run(
      threads->pool, tasks, [](void* context, std::size_t index) { (*static_cast<Callable*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace streamo
