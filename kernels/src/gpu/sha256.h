// SHA-256 (FIPS 180-4), for checking files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace streamo::gpu {

using Sha256 = std::array<uint8_t, 32>;

Sha256 sha256(const uint8_t* data, size_t bytes);

}  // namespace streamo::gpu
