// What all plugins of the process share: the GPU with its kernels, and what was refused, in words.
#pragma once

#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>

#include "streamo_gpu.h"

// Of this library alone: a process may have loaded one of another version too.
#pragma GCC visibility push(hidden)

namespace streamo::tensorrt {

using namespace nvinfer1;

constexpr int32_t kOk = 0, kFailed = -1;

inline ILoggerFinder* logger_finder = nullptr;

// What was refused, a line each, until somebody asks: TensorRT promises a logger only to plugins inside of an engine.
class Refusals {
 public:
  void add(std::string const& sentence) {
    std::lock_guard<std::mutex> const lock(mutex_);
    if (lines_.size() < kMost) lines_ += sentence + "\n";
  }
  std::string take() {
    std::lock_guard<std::mutex> const lock(mutex_);
    std::string found;
    found.swap(lines_);
    return found;
  }

 private:
  static constexpr size_t kMost = 2000;
  std::mutex mutex_;
  std::string lines_;
};

inline Refusals refusals;

inline int32_t fail(std::string const& sentence) noexcept {
  refusals.add(sentence);
  ILogger* const logger = logger_finder ? logger_finder->findLogger() : nullptr;
  if (logger) logger->log(ILogger::Severity::kERROR, sentence.c_str());
  return kFailed;
}

inline int32_t accept(streamo_status status, char const* what) noexcept {
  if (status == STREAMO_OK) return kOk;
  return fail(std::string(what) + ": " + streamo_last_error());
}

// The GPU with its kernels, opened once for all plugins of the process and given back with it.
inline streamo_gpu* gpu() noexcept {
  static std::mutex mutex;
  static streamo_gpu* opened = nullptr;
  std::lock_guard<std::mutex> const lock(mutex);
  if (opened) return opened;
  std::string folder;
  char const* const given = std::getenv("STREAMO_EDGE_CUBINS");
  if (given && *given) {
    folder = given;
  } else {  // beside the library that launches them
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void const*>(&streamo_gpu_open), &info) || !info.dli_fname) {
      fail("The GPU: it is not known where the kernels' library lies; STREAMO_EDGE_CUBINS can name their folder");
      return nullptr;
    }
    folder = info.dli_fname;
    folder.erase(folder.find_last_of('/') + 1);
    folder += "cubins";
  }
  // TensorRT itself works on the process's first GPU unless told otherwise, and nothing here tells it.
  if (accept(streamo_gpu_open(folder.c_str(), 0, &opened), "The GPU") != kOk) opened = nullptr;
  return opened;
}

// What one of streamo_gpu.h's functions that count a workspace answers. None without a GPU, or where it refuses:
// TensorRT's log has the sentence.
template <typename Count, typename... Arguments>
std::optional<size_t> workspace_bytes(char const* what, Count count, Arguments... arguments) noexcept {
  size_t bytes = 0;
  streamo_gpu* const device = gpu();
  if (!device || accept(count(device, arguments..., &bytes), what) != kOk) return std::nullopt;
  return bytes;
}

}  // namespace streamo::tensorrt

#pragma GCC visibility pop
