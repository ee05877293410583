// The peak rate of this CPU's multiply-adds, for benchmarks to compare with.
#pragma once

#include <cstdint>

#include "common/isa.h"

// Runs `rounds` rounds of independent multiply-adds that never leave the registers, and returns how
// many floating-point operations that were; 0 where the instruction set has no fused multiply-add.
IDDPM_DECLARE_CPU(double, multiply_add_burst, (int64_t rounds))
