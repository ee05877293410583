// Memory for the duration of one call.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/sizes.h"

namespace iddpm {
namespace IDDPM_ISA {

// One allocation, divided into arrays that begin on cache lines.
class Workspace {
 public:
  explicit Workspace(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, size_t(rounded(floats)) * 4))) {}
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  static int64_t rounded(int64_t floats) { return round_up(floats, 16); }
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

}  // namespace IDDPM_ISA
}  // namespace iddpm
