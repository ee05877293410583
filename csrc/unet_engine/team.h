// A thread's view of a running plan.
#pragma once

#include "native.h"
#include "plan.h"

namespace iddpm {

struct Team {
  int64_t thread, threads;
  int64_t n;
  const PlanRun* run;
  float* shared;
  int64_t shared_floats;
  float* scratch;
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
  const int64_t pieces = (count + grain - 1) / grain;
  const int64_t begin = pieces * thread / threads * grain;
  const int64_t end = pieces * (thread + 1) / threads * grain;
  return Range{begin < count ? begin : count, end < count ? end : count};
}

// Each returns 0, or 1 when the scratch is too small for it.
int run_input(const InputOp& op, const Team& team);
int run_output(const OutputOp& op, const Team& team);
int run_gemm(const GemmOp& op, const Team& team);
int run_conv(const ConvOp& op, const Team& team);
int run_winograd(const WinogradOp& op, const Team& team);
int run_group_norm(const GroupNormOp& op, const Team& team);
int run_attention(const AttentionOp& op, const Team& team);

}  // namespace IDDPM_ISA

// Kernels of *_bf16.cpp, which are compiled once, for AVX-512 with vdpbf16ps.
namespace avx512_bf16 {

int run_gemm_bf16(const GemmOp& op, const Team& team);
int run_winograd_bf16(const WinogradOp& op, const Team& team);

}  // namespace avx512_bf16
}  // namespace iddpm
