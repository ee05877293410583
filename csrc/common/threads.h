// Teams of threads; all parallel regions start here.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/float_mode.h"
#include "common/isa.h"
#include "common/sizes.h"

namespace iddpm {

// Whether this is the process that loaded the module. After fork() the OpenMP runtime of the child
// would wait forever for its parent's threads, so a kernel then runs on the calling thread alone,
// with the same result.
bool in_home_process();

namespace IDDPM_ISA {

struct Range {
  int64_t begin, end;
};

// The share of `thread` in [0, count), divided at multiples of `grain`.
static inline Range share(int64_t count, int64_t grain, int64_t thread, int64_t threads) {
  const int64_t pieces = divide_up(count, grain);
  return Range{smaller(pieces * thread / threads * grain, count),
               smaller(pieces * (thread + 1) / threads * grain, count)};
}

// Calls f(thread, threads) from every thread of a team, or once. All threads take over the caller's
// treatment of subnormal numbers, so that results do not depend on the number of threads.
template <typename F>
void for_threads(int64_t num_threads, bool serial, F f) {
  if (serial || num_threads <= 1 || !in_home_process()) return f(int64_t{0}, int64_t{1});
#if defined(_OPENMP)
  const FloatMode mode = float_mode();
#pragma omp parallel num_threads(int(num_threads))
  {
    const FloatMode before = set_float_mode(mode);
    f(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()});
    set_float_mode(before);
  }
#else
  f(int64_t{0}, int64_t{1});
#endif
}

// Calls f(job) for every job of [0, count), each thread for consecutive ones.
template <typename F>
void for_jobs(int64_t count, int64_t num_threads, bool serial, F f) {
  for_threads(num_threads, serial, [&](int64_t thread, int64_t threads) {
    const Range mine = share(count, 1, thread, threads);
    for (int64_t job = mine.begin; job < mine.end; ++job) f(job);
  });
}

// The same for jobs of very different lengths: a thread that is done takes the next few.
template <typename F>
void for_uneven_jobs(int64_t count, int64_t num_threads, bool serial, F f) {
  constexpr int64_t kFew = 4;
  int64_t next = 0;
  for_threads(num_threads, serial, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t begin = __atomic_fetch_add(&next, kFew, __ATOMIC_RELAXED);
      if (begin >= count) return;
      for (int64_t job = begin; job < smaller(begin + kFew, count); ++job) f(job);
    }
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
