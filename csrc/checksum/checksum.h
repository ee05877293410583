// A 64-bit checksum of a list of memory ranges: of a model's weights, at the beginning of each call
// that uses them (iddpm_ext/engines/weights.py has the definition in Python).
#pragma once

#include "common/isa.h"

#include <cstdint>

namespace iddpm {

struct ChecksumArgs {
  int64_t ranges;
  const int64_t* table;  // host memory, [ranges][2]: address, bytes
  uint64_t* sum;         // CUDA: one number on the device, which is added to
};

// The sum modulo 2^64, over the words w of 8 bytes of every range (zeros beyond its end), of
// low32(w ^ k) * high32(w ^ k) + w, where k = (range + 1) * kRangeKey + word * kWordKey. A sum does
// not depend on the order of work, and its terms depend on a word's place, so swaps change it.
constexpr uint64_t kRangeKey = 0xD6E8FEB86659FD93u;
constexpr uint64_t kWordKey = 0x9E3779B97F4A7C15u;

int checksum_cuda(const ChecksumArgs& args, void* stream);

}  // namespace iddpm

IDDPM_DECLARE_CPU(uint64_t, checksum, (const iddpm::ChecksumArgs& args, int num_threads))
