// Sizes of a head whose products are computed by tiles.
#pragma once

#include "common/dtype.h"
#include "common/sizes.h"

namespace iddpm {

constexpr int64_t kQueries = 32;  // rows of scores at a time

// Always inline, as no symbol may be shared between instruction sets.
struct AttentionTiles {
  int64_t tokens, width, depth;  // in multiples of 32, of 16, and of 32 again

  __attribute__((always_inline)) AttentionTiles(int64_t t, int64_t d)
      : tokens(round_up(t, 32)), width(round_up(d, 16)), depth(round_up(d, 32)) {}

  // Not a power of two: rows fall on different sets.
  __attribute__((always_inline)) int64_t score_pitch() const { return tokens + 16; }

  // Queries of which the backward pass keeps probabilities: with their slopes they take 1 MiB.
  __attribute__((always_inline)) int64_t block() const {
    const int64_t fit = (int64_t{256} << 10) / tokens / kQueries * kQueries;
    return smaller(larger(fit, kQueries), tokens);
  }

  // Floats of a thread. Every piece is a multiple of 16 of them.
  __attribute__((always_inline)) int64_t forward_floats() const {
    return tokens * (width + 3 * depth / 2) + kQueries * (2 * score_pitch() + width);
  }
  __attribute__((always_inline)) int64_t backward_floats() const {
    const int64_t head = tokens * (3 * width + 3 * depth / 2 + width / 2);
    const int64_t queries = block() * (depth + width + tokens);
    return head + queries + kQueries * (3 * score_pitch() + width);
  }

  __attribute__((always_inline)) static float* take(float*& space, int64_t floats) {
    float* taken = space;
    space += floats;
    return taken;
  }
  __attribute__((always_inline)) static BFloat16* take_halves(float*& space, int64_t halves) {
    return reinterpret_cast<BFloat16*>(take(space, halves / 2));
  }
};

}  // namespace iddpm
