// A thread's place in the team that runs a kernel, and the memory that it may use.
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

// Every thread of the team has to come here. With one thread nothing happens.
static inline void barrier(const Team& team) {
  if (team.threads > 1) {
#pragma omp barrier
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
