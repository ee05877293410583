#include "checksum/checksum.h"

#include <cstring>

#include "common/threads.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

constexpr int64_t kWords = 8, kUnroll = 4, kStep = kWords * kUnroll;
constexpr int64_t kAhead = 2048;                     // bytes
constexpr int64_t kWordsAThread = int64_t{1} << 17;  // 1 MB: less is not worth a team

typedef uint64_t Words __attribute__((vector_size(8 * kWords)));

inline uint64_t mixed(uint64_t word, uint64_t key) {
  const uint64_t v = word ^ key;
  return (v & 0xffffffffu) * (v >> 32) + word;
}

// Of the words from first to last - 1 of a range of `bytes` bytes.
uint64_t sum_of(const unsigned char* data, int64_t bytes, uint64_t range_key, int64_t first,
                int64_t last) {
  const int64_t whole = last < bytes / 8 ? last : bytes / 8;
  Words key[kUnroll], sum[kUnroll] = {};
  for (int64_t u = 0; u < kUnroll; ++u)
    for (int64_t i = 0; i < kWords; ++i)
      key[u][i] = range_key + uint64_t(first + u * kWords + i) * kWordKey;
  int64_t at = first;
  for (; at + kStep <= whole; at += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) {
      // Weights that were last read a chain ago come from memory, a page at a time without this.
      __builtin_prefetch(data + 8 * (at + u * kWords) + kAhead);
      Words w;
      std::memcpy(&w, data + 8 * (at + u * kWords), sizeof w);
      const Words v = w ^ key[u];
      sum[u] += (v & 0xffffffffu) * (v >> 32) + w;
      key[u] += uint64_t(kStep) * kWordKey;
    }
  uint64_t total = 0;
  for (int64_t u = 0; u < kUnroll; ++u)
    for (int64_t i = 0; i < kWords; ++i) total += sum[u][i];
  for (; at < last; ++at) {
    uint64_t word = 0;
    std::memcpy(&word, data + 8 * at, size_t(bytes - 8 * at < 8 ? bytes - 8 * at : 8));
    total += mixed(word, range_key + uint64_t(at) * kWordKey);
  }
  return total;
}

}  // namespace

// All ranges lie end to end in one row of words, of which each thread takes an equal part.
uint64_t checksum(const ChecksumArgs& a, int num_threads) {
  int64_t words = 0;
  for (int64_t r = 0; r < a.ranges; ++r) words += (a.table[2 * r + 1] + 7) / 8;
  uint64_t total = 0;
  for_threads(num_threads, words < 2 * kWordsAThread, [&](int64_t thread, int64_t threads) {
    const int64_t begin = words * thread / threads, end = words * (thread + 1) / threads;
    uint64_t own = 0;
    for (int64_t r = 0, before = 0; r < a.ranges && before < end; ++r) {
      const int64_t bytes = a.table[2 * r + 1], here = (bytes + 7) / 8;
      const int64_t first = begin > before ? begin - before : 0;
      const int64_t last = end - before < here ? end - before : here;
      const auto* data = reinterpret_cast<const unsigned char*>(intptr_t(a.table[2 * r]));
      if (first < last) own += sum_of(data, bytes, uint64_t(r + 1) * kRangeKey, first, last);
      before += here;
    }
#pragma omp atomic
    total += own;
  });
  return total;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
