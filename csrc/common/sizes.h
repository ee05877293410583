// Arithmetic of sizes, without libstdc++ and without symbols that instruction sets would share (see
// isa.h).
#pragma once

#include <cstdint>

namespace iddpm {

static constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// a / b, rounded up, for a >= 0.
static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest multiple of `step` that is at least a.
static constexpr int64_t round_up(int64_t a, int64_t step) { return divide_up(a, step) * step; }

}  // namespace iddpm
