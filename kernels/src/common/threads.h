// Running tasks on a caller's threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <new>
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

// As `parallel_for`, for bodies that need memory: false if one of them found none. No exception may leave a task, it
// would run through a caller's thread.
template <typename Body>
bool try_parallel_for(const streamo_threads* threads, std::size_t tasks, const Body& body) {
  std::atomic<bool> done{true};
  parallel_for(threads, tasks, [&](std::size_t task) {
    try {
      body(task);
    } catch (const std::bad_alloc&) {
      done = false;
    }
  });
  return done;
}

}  // namespace streamo
