#include "gpu/archive.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>

#include "common/status.h"
#include "gpu/sha256.h"

namespace streamo::gpu {
namespace {

constexpr char kMagic[] = "STREAMOGPU1";  // with its zero: 12 bytes
constexpr size_t kHashBytes = sizeof(Sha256), kCubinAlignment = 16;
constexpr long kMostBytes = 1L << 30;
constexpr uint32_t kMostWarps = 32;
constexpr size_t kMostLetters = 64;  // arguments of one kernel

// Reads numbers and strings from the front of a piece of memory; what is beyond the end reads as a failure.
class Reader {
 public:
  Reader(const uint8_t* data, size_t bytes) : data_(data), bytes_(bytes) {}

  uint32_t number(int width) {
    uint32_t value = 0;
    const uint8_t* at = skip(static_cast<size_t>(width));
    for (int i = 0; at != nullptr && i < width; ++i) value |= uint32_t{at[i]} << 8 * i;
    return value;
  }

  std::string text() {
    const size_t length = number(2);
    const uint8_t* at = skip(length);
    return at == nullptr ? std::string() : std::string(reinterpret_cast<const char*>(at), length);
  }

  const uint8_t* skip(size_t count) {
    if (failed_ || count > bytes_ - used_) {
      failed_ = true;
      return nullptr;
    }
    const uint8_t* at = data_ + used_;
    used_ += count;
    return at;
  }

  void align(size_t to) { skip((to - used_ % to) % to); }
  bool failed() const { return failed_; }
  bool finished() const { return !failed_ && used_ == bytes_; }

 private:
  const uint8_t* data_;
  size_t bytes_, used_ = 0;
  bool failed_ = false;
};

streamo_status damaged(const std::string& file, const char* how) {
  return refuse(STREAMO_NO_KERNEL, "the GPU kernels in `%s` are damaged: %s", file.c_str(), how);
}

bool is_plausible(const ArchivedKernel& kernel) {
  const bool letters = kernel.letters.size() <= kMostLetters &&
                       kernel.letters.find_first_not_of("pilf") == std::string::npos;
  return letters && !kernel.name.empty() && !kernel.symbol.empty() &&
         kernel.name.find('\0') == std::string::npos && kernel.symbol.find('\0') == std::string::npos &&
         kernel.warps >= 1 && kernel.warps <= kMostWarps && (kernel.warps & (kernel.warps - 1)) == 0;
}

ArchivedKernel read_kernel(Reader& reader) {
  ArchivedKernel kernel;
  kernel.name = reader.text();
  kernel.symbol = reader.text();
  kernel.letters = reader.text();
  kernel.warps = reader.number(4);
  kernel.shared_bytes = reader.number(4);
  kernel.registers = reader.number(4);
  kernel.spill_bytes = reader.number(4);
  const uint32_t bytes = reader.number(4);
  reader.align(kCubinAlignment);
  kernel.cubin = bytes == 0 ? nullptr : reader.skip(bytes);
  return kernel;
}

streamo_status read_file(const std::string& path, const std::string& file, std::vector<uint8_t>* bytes) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> handle(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (handle == nullptr) return refuse(STREAMO_NO_KERNEL, "the GPU kernels in `%s` cannot be opened", file.c_str());
  if (std::fseek(handle.get(), 0, SEEK_END) != 0) return damaged(file, "it is no file");
  const long size = std::ftell(handle.get());
  if (size < 0 || size > kMostBytes) return damaged(file, "its size is not that of an archive");
  std::rewind(handle.get());
  bytes->resize(static_cast<size_t>(size));
  if (std::fread(bytes->data(), 1, bytes->size(), handle.get()) != bytes->size()) {
    return damaged(file, "it cannot be read to its end");
  }
  return STREAMO_OK;
}

bool exists(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file != nullptr) std::fclose(file);
  return file != nullptr;
}

std::string file_of(int32_t sm) { return "sm_" + std::to_string(sm) + ".cubins"; }

}  // namespace

// Machine code runs on its own compute capability and, within one major number, on higher ones. Exceptions: the Orin
// (87) shares code with no other; and from 90 on, the compiler uses instructions that only that one capability has.
bool runs_on(int32_t kernel_sm, int32_t device_sm) {
  if (kernel_sm == device_sm) return true;
  const bool alone = device_sm >= 90 || device_sm == 87 || kernel_sm == 87;
  return !alone && kernel_sm / 10 == device_sm / 10 && kernel_sm < device_sm;
}

streamo_status parse_archive(std::vector<uint8_t> bytes, const std::string& file, Archive* archive) {
  archive->kernels.clear();
  archive->memory = std::move(bytes);
  const uint8_t* data = archive->memory.data();
  if (archive->memory.size() < sizeof kMagic + kHashBytes || std::memcmp(data, kMagic, sizeof kMagic) != 0) {
    return damaged(file, "it does not start as an archive of GPU kernels of this version");
  }
  const size_t size = archive->memory.size() - kHashBytes;
  const Sha256 hash = sha256(data, size);
  if (std::memcmp(hash.data(), data + size, kHashBytes) != 0) return damaged(file, "its checksum does not match");

  Reader reader(data, size);
  reader.skip(sizeof kMagic);
  archive->sm = static_cast<int32_t>(reader.number(4));
  archive->cuda_version = static_cast<int32_t>(reader.number(4));
  const uint32_t count = reader.number(4);
  for (uint32_t i = 0; i < count && !reader.failed(); ++i) {
    archive->kernels.push_back(read_kernel(reader));
    if (!reader.failed() && (archive->kernels.back().cubin == nullptr || !is_plausible(archive->kernels.back()))) {
      return damaged(file, "a kernel's description makes no sense");
    }
  }
  if (!reader.finished()) return damaged(file, "its entries do not fill it exactly");
  return STREAMO_OK;
}

streamo_status read_archive_for(const char* folder, int32_t device_sm, Archive* archive) {
  const std::string base = std::string(folder) + "/";
  int32_t sm = device_sm;
  while (sm / 10 == device_sm / 10 && !(runs_on(sm, device_sm) && exists(base + file_of(sm)))) --sm;
  if (sm / 10 != device_sm / 10) {
    return refuse(STREAMO_NO_KERNEL, "there are no GPU kernels for compute capability %d.%d: expected `%s` in `%s`",
                  device_sm / 10, device_sm % 10, file_of(device_sm).c_str(), folder);
  }
  std::vector<uint8_t> bytes;
  if (const streamo_status status = read_file(base + file_of(sm), file_of(sm), &bytes)) return status;
  if (const streamo_status status = parse_archive(std::move(bytes), file_of(sm), archive)) return status;
  if (archive->sm != sm) return damaged(file_of(sm), "it holds the kernels of another GPU generation");
  return STREAMO_OK;
}

}  // namespace streamo::gpu
