// The file of machine code for one GPU generation, as kernels/gpu/archive.py writes it. Knows no device.
//
// All numbers are little-endian. 12 bytes "STREAMOGPU1\0"; u32 sm, u32 CUDA version of the assembler, u32 kernels; for
// each kernel: name, symbol, argument letters (each u16 length and bytes), u32 warps, u32 shared bytes, u32 registers,
// u32 spill bytes, u32 cubin bytes, zeros up to a multiple of 16 from the start of the file, cubin; at the end the
// SHA-256 of everything before.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "streamo_gpu.h"

namespace streamo::gpu {

struct ArchivedKernel {
  std::string name, symbol, letters;
  uint32_t warps, shared_bytes, registers, spill_bytes;
  const uint8_t* cubin;  // inside the archive's memory
};

struct Archive {
  int32_t sm = 0, cuda_version = 0;
  std::vector<ArchivedKernel> kernels;
  std::vector<uint8_t> memory;
};

// Whether code for `kernel_sm` runs on a device with `device_sm`.
bool runs_on(int32_t kernel_sm, int32_t device_sm);

// The archive in `folder` that suits the device best, read and checked. STREAMO_NO_KERNEL says what is wrong.
streamo_status read_archive_for(const char* folder, int32_t device_sm, Archive* archive);

// Takes the file's bytes apart; `file` is its name, for sentences.
streamo_status parse_archive(std::vector<uint8_t> bytes, const std::string& file, Archive* archive);

}  // namespace streamo::gpu
