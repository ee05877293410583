// A team of threads.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/isa.h"

namespace iddpm {
namespace IDDPM_ISA {

// Calls f(thread, threads) from every thread of a team, or once.
template <typename F>
void for_threads(int num_threads, bool serial, F f) {
  if (serial || num_threads <= 1) return f(int64_t{0}, int64_t{1});
#pragma omp parallel num_threads(num_threads)
  {
#if defined(_OPENMP)
    f(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()});
#else
    f(int64_t{0}, int64_t{1});
#endif
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
