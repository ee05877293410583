// Block sums with a planted bug, chosen by the command line: what the emulator must find. Prints
// the launch's message, or "right" or "wrong" for the sums.
#include <cstdio>
#include <cstring>

#include "common/cuda_compat.cuh"

namespace {

enum Bug {
  kNone,
  kMissingBarrier,          // scratch is read before all warps have written it
  kMissingTrailingBarrier,  // a fast warp overwrites scratch that a slow one still reads
  kDivergentBarrier,
  kReturnBeforeBarrier,
  kMissedShuffle,
  kUnsetShared,
  kOverrun,
  kMisaligned,
  kEmptyGrid,
  kTooMuchShared,
};
const char* const kNames[] = {
    "none",
    "missing_barrier",
    "missing_trailing_barrier",
    "divergent_barrier",
    "return_barrier",
    "missed_shuffle",
    "unset_shared",
    "overrun",
    "misaligned",
    "empty_grid",
    "too_much_shared",
};

constexpr int kThreads = 128, kWarps = kThreads / 32, kBlocks = 3, kRounds = 2;

// sums[r, b] = sum over block b's elements of x + r.
__global__ void sum_blocks(const float* x, float* sums, Bug bug) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  IDDPM_SMEM(float, scratch, kWarps);
  IDDPM_SMEM_DYNAMIC(float, spare);
  if (bug == kReturnBeforeBarrier && warp == 1) return;
  for (int round = 0; round < kRounds; ++round) {
    float value = x[blockIdx.x * kThreads + thread] + static_cast<float>(round);
    if (bug != kMissedShuffle || thread != 40) value = iddpm::warp_sum(value);
    if (lane == 0 && (bug != kUnsetShared || warp != 2)) scratch[warp] = value;
    if (bug == kOverrun && thread == 0) scratch[kWarps] = 0.0f;
    if (bug == kDivergentBarrier && warp == 0) __syncthreads();
    if (bug != kMissingBarrier) __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < kWarps; ++i) total += scratch[i];
    spare[thread] = total;
    if (lane == 31) sums[(round * kBlocks + blockIdx.x) * kWarps + warp] = spare[thread];
    if (bug != kMissingTrailingBarrier) __syncthreads();
  }
  if (bug == kMisaligned) iddpm::load_pack<float, 4>(x + 1);
}

}  // namespace

int main(int argc, char** argv) {
  int bug = 0;
  while (argc > 1 && strcmp(kNames[bug], argv[1]) != 0) ++bug;
  alignas(16) static float x[kBlocks * kThreads], sums[kRounds * kBlocks * kWarps];
  float expected[kBlocks] = {};
  for (int i = 0; i < kBlocks * kThreads; ++i) expected[i / kThreads] += x[i] = float(i % 7);
  const size_t shared = bug == kTooMuchShared ? 300 << 10 : kThreads * sizeof(float);
  IDDPM_LAUNCH(sum_blocks, dim3(bug == kEmptyGrid ? 0 : kBlocks), dim3(kThreads), shared, nullptr,
               x, sums, static_cast<Bug>(bug));
  if (const int code = iddpm::launch_status())
    return printf("%d %s\n", code, cuda_emu_message()), 0;
  bool right = true;
  for (int i = 0; i < kRounds * kBlocks * kWarps; ++i) {
    const int block = i / kWarps % kBlocks, round = i / (kWarps * kBlocks);
    right = right && sums[i] == expected[block] + float(round * kThreads);
  }
  puts(right ? "right" : "wrong");
}
