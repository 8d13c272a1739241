// Owns streamo_threads_create: threads that stay, wait a moment awake and then asleep, and take tasks one at a time.
//
// One 64-bit ticket holds the job's number and the next task's index, so a thread that comes late can never take a task
// of another job than the one it has read: its compare-and-swap fails. Between jobs the index stands at kClosed. The
// caller works too and waits for tasks, not for threads: one that did not wake up in time holds nobody up.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "common/status.h"
#include "streamo_kernels.h"

namespace streamo {
namespace {

constexpr std::uint64_t kClosed = 0xffffffffU;
constexpr std::uint64_t kNextJob = std::uint64_t{1} << 32;
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPausesPerLook = 32;
constexpr int kMaxThreads = 1024;

std::uint64_t job_of(std::uint64_t ticket) { return ticket & ~kClosed; }

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

thread_local bool inside_a_task = false;

class ThreadPool {
 public:
  explicit ThreadPool(int count) : handle_{this, count, &ThreadPool::run_in} {
    workers_.reserve(static_cast<std::size_t>(count - 1));
    try {
      for (int i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() { stop(); }

  streamo_threads* handle() { return &handle_; }

 private:
  static void run_in(void* pool, std::size_t tasks, streamo_task task, void* context) {
    static_cast<ThreadPool*>(pool)->run(tasks, task, context);
  }

  void run(std::size_t tasks, streamo_task task, void* context) {
    if (workers_.empty() || tasks <= 1 || tasks >= kClosed || inside_a_task) {
      for (std::size_t i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    const std::lock_guard<std::mutex> one_job(callers_);
    finished_.store(0, std::memory_order_relaxed);
    tasks_.store(tasks, std::memory_order_release);
    task_.store(task, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    const std::uint64_t job = job_of(ticket_.load(std::memory_order_relaxed)) + kNextJob;
    ticket_.store(job);
    if (asleep_.load() > 0) {
      { const std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    take_tasks();
    while (finished_.load(std::memory_order_acquire) != tasks) wait_for_last();
    ticket_.store(job | kClosed);
  }

  // Others hold the last tasks: they need the core more than we do if there are more threads than cores.
  void wait_for_last() {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (finished_.load(std::memory_order_relaxed) == tasks_.load(std::memory_order_relaxed)) return;
      pause();
    }
    std::this_thread::yield();
  }

  // Runs tasks of the open job until none is left.
  void take_tasks() {
    inside_a_task = true;
    std::size_t done = 0;
    std::uint64_t ticket = ticket_.load();
    for (;;) {
      const std::size_t tasks = tasks_.load(std::memory_order_acquire);
      const streamo_task task = task_.load(std::memory_order_acquire);
      void* context = context_.load(std::memory_order_acquire);
      const std::size_t index = ticket & kClosed;
      if (index >= tasks) break;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      task(context, index);
      ++done;
      ticket = ticket_.load();
    }
    inside_a_task = false;
    if (done > 0) finished_.fetch_add(done, std::memory_order_acq_rel);
  }

  void work() {
    std::uint64_t seen = 0;
    while (!stopping_.load()) {
      seen = wait_for_job(seen);
      take_tasks();
    }
  }

  // Returns the number of a job other than `seen`, or anything once the pool stops.
  std::uint64_t wait_for_job(std::uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < kPausesPerLook; ++i) {
        const std::uint64_t job = job_of(ticket_.load(std::memory_order_acquire));
        if (job != seen || stopping_.load(std::memory_order_relaxed)) return job;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);

    std::unique_lock<std::mutex> lock(sleep_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return job_of(ticket_.load()) != seen || stopping_.load(); });
    asleep_.fetch_sub(1);
    return job_of(ticket_.load());
  }

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      stopping_.store(true);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  streamo_threads handle_;
  std::vector<std::thread> workers_;
  std::mutex callers_;  // one job at a time

  alignas(64) std::atomic<std::uint64_t> ticket_{kClosed};
  alignas(64) std::atomic<std::size_t> finished_{0};
  alignas(64) std::atomic<std::size_t> tasks_{0};
  std::atomic<streamo_task> task_{nullptr};
  std::atomic<void*> context_{nullptr};

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> asleep_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace
}  // namespace streamo

extern "C" streamo_threads* streamo_threads_create(int32_t count) {
  streamo::clear_error();
  if (count < 1 || count > streamo::kMaxThreads) {
    streamo::refuse(STREAMO_BAD_ARGUMENT, "threads: expected 1 to %d, found %d", streamo::kMaxThreads, count);
    return nullptr;
  }
  try {
    return (new streamo::ThreadPool(count))->handle();
  } catch (const std::exception& error) {
    streamo::refuse(STREAMO_OUT_OF_MEMORY, "threads: %d cannot be started: %s", count, error.what());
    return nullptr;
  }
}

extern "C" void streamo_threads_destroy(streamo_threads* threads) {
  if (threads != nullptr) delete static_cast<streamo::ThreadPool*>(threads->pool);
}
