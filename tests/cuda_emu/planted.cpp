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
  kNoClusterBarrier,    // another block's shared memory is written before that block has started
  kNoClusterWait,       // what the others wrote is read before they arrived
  kHalfClusterBarrier,  // one block waits and has not arrived
  kNoCopyWait,          // what is copied asynchronously is read at once
  kOddCluster,          // the grid is not a number of clusters
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
    "no_cluster_barrier",
    "no_cluster_wait",
    "half_cluster_barrier",
    "no_copy_wait",
    "odd_cluster",
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

// sums[b] = sum over all of x: the blocks of the one cluster send each other their own.
__global__ void sum_cluster(const float* x, float* sums, Bug bug) {
  const int thread = static_cast<int>(threadIdx.x), rank = iddpm::cluster_rank();
  IDDPM_SMEM(float, mine, kThreads);
  IDDPM_SMEM(float, scratch, 32);
  IDDPM_SMEM(float, inbox, kBlocks);
  if (bug != kNoClusterBarrier) iddpm::cluster_arrive();
  if (thread < kThreads / 4)
    iddpm::copy_async(mine + 4 * thread, x + blockIdx.x * kThreads + 4 * thread);
  if (bug != kNoCopyWait) iddpm::copy_async_wait();
  __syncthreads();
  const float total = iddpm::block_sum(mine[thread], scratch);
  if (bug != kNoClusterBarrier) iddpm::cluster_wait();
  if (thread < kBlocks) iddpm::cluster_store(inbox + rank, thread, total);
  if (bug != kHalfClusterBarrier || rank != 1) iddpm::cluster_arrive();
  if (bug != kNoClusterWait) iddpm::cluster_wait();
  float sum = 0.0f;
  for (int i = 0; i < kBlocks; ++i) sum += inbox[i];
  if (thread == 0) sums[blockIdx.x] = sum;
}

bool cluster_is_right(const float* x, float* sums, Bug bug) {
  IDDPM_LAUNCH_CLUSTER(sum_cluster, dim3(bug == kOddCluster ? kBlocks + 1 : kBlocks), kBlocks,
                       dim3(kThreads), 0, nullptr, x, sums, bug);
  float expected = 0.0f;
  for (int i = 0; i < kBlocks * kThreads; ++i) expected += x[i];
  bool right = true;
  for (int i = 0; i < kBlocks; ++i) right = right && sums[i] == expected;
  return right;
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
  alignas(16) static float of_cluster[kBlocks + 1];
  const bool cluster_right = cluster_is_right(x, of_cluster, static_cast<Bug>(bug));
  if (const int code = iddpm::launch_status())
    return printf("%d %s\n", code, cuda_emu_message()), 0;
  bool right = cluster_right;
  for (int i = 0; i < kRounds * kBlocks * kWarps; ++i) {
    const int block = i / kWarps % kBlocks, round = i / (kWarps * kBlocks);
    right = right && sums[i] == expected[block] + float(round * kThreads);
  }
  puts(right ? "right" : "wrong");
}
