// A thread's place in the team that runs a kernel, and the memory that it may use.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/sizes.h"

namespace iddpm {

struct Team {
  int64_t thread, threads;
  int64_t n;      // samples
  float* shared;  // scratch of the team
  int64_t shared_floats;
  float* scratch;  // scratch of this thread
  int64_t scratch_floats;
};

namespace IDDPM_ISA {

// Every thread of the team has to come here. With one thread nothing happens.
static inline void barrier(const Team& team) {
  if (team.threads > 1) {
#pragma omp barrier
  }
}

struct Range {
  int64_t begin, end;
};

// The share of `thread` of [0, count), cut at multiples of `grain`.
static inline Range share(int64_t count, int64_t grain, int64_t thread, int64_t threads) {
  const int64_t pieces = divide_up(count, grain);
  return Range{smaller(pieces * thread / threads * grain, count),
               smaller(pieces * (thread + 1) / threads * grain, count)};
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
