// A thread's index in the team that runs a kernel, and its scratch memory.
#pragma once

#include "common/threads.h"

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

// A barrier of all threads of the team; no effect for one thread.
static inline void barrier(const Team& team) {
  if (team.threads > 1) {
#pragma omp barrier
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
