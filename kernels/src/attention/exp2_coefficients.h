// Polynomials for 2^f, f in [0, 1], with the least largest relative error (fitted by Lawson's iteration).
#pragma once

namespace streamo {
namespace {

// Relative error 1.7e-3: enough where the result becomes an 8-bit weight.
[[maybe_unused]] constexpr float kExp2Coarse[3] = {1.00172475f, 0.6576363f, 0.33718944f};
// Relative error 7.5e-8, float rounding apart.
[[maybe_unused]] constexpr float kExp2Fine[6] = {0.9999999251f,  0.6931530732f,   0.2401536171f,
                                                 0.05582631793f, 0.008989340142f, 0.001877576683f};

}  // namespace
}  // namespace streamo
