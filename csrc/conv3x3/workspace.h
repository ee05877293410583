// Memory and a team of threads for the length of one call.
#pragma once

#include <cstdlib>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "unet_engine/team.h"

namespace iddpm {
namespace IDDPM_ISA {

// Pieces of one allocation, each on a cache line of its own.
class Workspace {
 public:
  explicit Workspace(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, size_t(rounded(floats)) * 4))) {}
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }
  bool failed() const { return data_ == nullptr; }
  float* take(int64_t floats) {
    float* piece = data_ + used_;
    used_ += rounded(floats);
    return piece;
  }

 private:
  float* data_;
  int64_t used_ = 0;
};

// Calls work(thread, threads) on every thread of a team.
template <class Work>
static inline void on_team(int num_threads, const Work& work) {
#if defined(_OPENMP)
  if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(0, 1);
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
