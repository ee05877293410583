// One launch, or a few, for all ranges: the table is a kernel argument. A block sums 32 KB of one
// range. The sums are integers, so the order of the atomics does not matter.
#pragma once

#include "checksum/checksum.h"
#include "common/cuda_compat.cuh"

namespace iddpm {

constexpr int kChecksumThreads = 256;
constexpr int64_t kChecksumWords = 16 * kChecksumThreads;
constexpr int kChecksumRanges = 120;  // of 4 numbers, within the 4 KB of a kernel's arguments

struct ChecksumRange {
  int64_t first_block, address, bytes;
  uint64_t key;
};

struct ChecksumBatch {
  int64_t ranges;
  uint64_t* sum;
  ChecksumRange range[kChecksumRanges];
};

// The word at an address of any alignment, whose bytes beyond `left` are zeros.
IDDPM_DEVICE uint64_t checksum_word(int64_t address, int64_t left) {
  if (left >= 8 && address % 8 == 0)
    return *reinterpret_cast<const uint64_t*>(static_cast<intptr_t>(address));
  const auto* p = reinterpret_cast<const unsigned char*>(static_cast<intptr_t>(address));
  uint64_t word = 0;
  for (int i = 0; i < 8 && i < left; ++i) word |= uint64_t(p[i]) << (8 * i);
  return word;
}

__global__ void __launch_bounds__(kChecksumThreads) checksum_kernel(const ChecksumBatch a) {
  int low = 0, high = static_cast<int>(a.ranges) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.range[middle].first_block <= static_cast<int64_t>(blockIdx.x))
      low = middle;
    else
      high = middle - 1;
  }
  const ChecksumRange& range = a.range[low];
  const int64_t words = (range.bytes + 7) / 8;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - range.first_block) * kChecksumWords;
  const int64_t last = first + kChecksumWords < words ? first + kChecksumWords : words;
  uint64_t own = 0;
  for (int64_t at = first + threadIdx.x; at < last; at += kChecksumThreads) {
    const uint64_t word = checksum_word(range.address + 8 * at, range.bytes - 8 * at);
    const uint64_t v = word ^ (range.key + static_cast<uint64_t>(at) * kWordKey);
    own += (v & 0xffffffffu) * (v >> 32) + word;
  }
  IDDPM_SMEM(uint64_t, sums, kChecksumThreads);
  sums[threadIdx.x] = own;
  __syncthreads();
  for (int half = kChecksumThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(a.sum),
              static_cast<unsigned long long>(sums[0]));
}

inline void checksum_launch(const ChecksumArgs& a, void* stream) {
  ChecksumBatch batch{};
  batch.sum = a.sum;
  int64_t blocks = 0;
  for (int64_t r = 0; r < a.ranges; ++r) {
    const int64_t address = a.table[2 * r], bytes = a.table[2 * r + 1];
    if (bytes > 0) {
      batch.range[batch.ranges++] = {blocks, address, bytes,
                                     static_cast<uint64_t>(r + 1) * kRangeKey};
      blocks += ((bytes + 7) / 8 + kChecksumWords - 1) / kChecksumWords;
    }
    if (batch.ranges > 0 && (batch.ranges == kChecksumRanges || r + 1 == a.ranges)) {
      IDDPM_LAUNCH(checksum_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kChecksumThreads), 0,
                   stream, batch);
      batch.ranges = 0, blocks = 0;
    }
  }
}

}  // namespace iddpm
