// Attention with both products by AMX in bfloat16; scores, softmax and sums are float32.
//
// A head's keys and values are packed once; its queries are processed in blocks of 32.
#include "common/simd_math.h"
#include "nhwc/tile_matrix.h"
#include "unet_engine/plan.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

constexpr int64_t kQueries = 2 * kTileEdge;

// One head's memory.
struct Head {
  int64_t tokens, width;
  int64_t columns, depth;  // tokens and width, rounded up to multiples of 32
  int64_t score_pitch;     // floats
  BFloat16* q;             // [columns][depth]
  BFloat16* k;             // [columns / 16][depth / 32][16][16][2], pairs of channels
  BFloat16* v;             // [depth / 16][columns / 32][16][16][2], pairs of tokens
  float* scores;           // [32][score_pitch]
  BFloat16* p;             // [32][2 * score_pitch]
  float* out;              // [32][depth]
  BFloat16* rows;          // [16][depth], rounded before they are packed

  Head(int64_t t, int64_t d, float* memory)
      : tokens(t), width(d), columns(round_up(t, 32)), depth(round_up(d, 32)) {
    score_pitch = columns + 16;
    const int64_t halves = columns * depth;
    q = reinterpret_cast<BFloat16*>(memory);
    k = q + halves;
    v = k + halves;
    scores = reinterpret_cast<float*>(v + halves);
    p = reinterpret_cast<BFloat16*>(scores + kQueries * score_pitch);
    out = scores + 2 * kQueries * score_pitch;
    rows = reinterpret_cast<BFloat16*>(out + kQueries * depth);
  }
};

// Floats [c, c + 16) of a row of `width` floats; zero beyond its end.
IDDPM_INLINE vf part_of_row(const float* row, int64_t c, int64_t width) {
  return load_some(row + c, larger(smaller(width - c, kLanes), 0));
}

// Rounds `width` floats times a factor to bfloat16, and pads with zeros to `depth`.
IDDPM_INLINE void round_row(const float* in, int64_t width, int64_t depth, float factor,
                            BFloat16* out) {
  for (int64_t c = 0; c < depth; c += kLanes) store(out + c, part_of_row(in, c, width) * factor);
}

void pack(const TileAttentionOp& op, const float* qkv, const Head& head) {
  const int64_t d = op.width, depth = head.depth, chunks = head.columns / kTileDepth;
  const float factor = 1.44269504f / __builtin_sqrtf(float(d));  // softmax by powers of two
  for (int64_t first = 0; first < head.columns; first += kTileEdge) {
    for (int64_t i = 0; i < kTileEdge; ++i) {
      const int64_t token = first + i, width = token < op.tokens ? d : 0;
      const float* in = qkv + token * op.qkv_stride;
      round_row(in, width, depth, factor, head.q + token * depth);
      round_row(in + d, width, depth, 1.0f, head.rows + i * depth);
    }
    BFloat16* k = head.k + first * depth;
    for (int64_t c = 0; c < depth; c += kTileDepth, k += kTileHalves)
      transpose_pairs(head.rows + c, depth, k);
  }
  for (int64_t token = 0; token < head.columns; token += 2) {
    const int64_t even_width = token < op.tokens ? d : 0, odd_width = token + 1 < op.tokens ? d : 0;
    const float* even = qkv + token * op.qkv_stride + 2 * d;
    const float* odd = even + op.qkv_stride;
    BFloat16* v = head.v + (token / kTileDepth * kTileEdge + token % kTileDepth / 2) * kTileDepth;
    for (int64_t c = 0; c < depth; c += kTileEdge, v += chunks * kTileHalves)
      store_pairs(v, part_of_row(even, c, even_width), part_of_row(odd, c, odd_width));
  }
}

// p = 2^(scores - their maximum), rounded; returns one over the sum of what was not.
float soften(const Head& head, float* scores, BFloat16* p) {
  for (int64_t j = head.tokens; j < head.columns; ++j) scores[j] = -1e30f;
  nv most[2] = {load<nv>(scores), load<nv>(scores + kWidth)}, total[2] = {};
  for (int64_t j = 2 * kWidth; j < head.columns; j += 2 * kWidth) {
    IDDPM_UNROLL
    for (int i = 0; i < 2; ++i) most[i] = max(most[i], load<nv>(scores + j + i * kWidth));
  }
  const nv maximum = splat<nv>(largest(max(most[0], most[1])));
  for (int64_t j = 0; j < head.columns; j += 2 * kWidth) {
    nv e[2];
    IDDPM_UNROLL
    for (int i = 0; i < 2; ++i) {
      e[i] = exp2_coarse(load<nv>(scores + j + i * kWidth) - maximum);
      total[i] += e[i];
    }
    store_both(p + j, e[0], e[1]);
  }
  return 1.0f / sum(total[0] + total[1]);
}

void attend(const TileAttentionOp& op, const float* qkv, BFloat16* out, const Head& head) {
  pack(op, qkv, head);
  const int64_t d = op.width, depth_bytes = 2 * head.depth, score_bytes = 4 * head.score_pitch;
  for (int64_t first = 0; first < op.tokens; first += kQueries) {
    multiply_tiles(head.q + first * head.depth, depth_bytes, 2, head.depth / kTileDepth, head.k,
                   head.columns / kTileEdge, head.scores, score_bytes, false);
    const int64_t count = smaller(kQueries, op.tokens - first);
    float inverse[kQueries];
    for (int64_t i = 0; i < count; ++i)
      inverse[i] =
          soften(head, head.scores + i * head.score_pitch, head.p + 2 * i * head.score_pitch);
    multiply_tiles(head.p, score_bytes, 2, head.columns / kTileDepth, head.v,
                   head.depth / kTileEdge, head.out, 4 * head.depth, false);
    for (int64_t i = 0; i < count; ++i) {
      const float* from = head.out + i * head.depth;
      BFloat16* to = out + (first + i) * op.out_stride;
      for (int64_t c = 0; c < d; c += kLanes)
        store_some(to + c, load(from + c) * inverse[i], smaller(d - c, kLanes));
    }
  }
}

}  // namespace

int run_tile_attention(const TileAttentionOp& op, const Team& team) {
  if (tile_attention_scratch(op.tokens, op.width) > team.scratch_floats) return 1;
  const Head head(op.tokens, op.width, team.scratch);
  const Tiles tiles;
  const Range units = share(team.n * op.heads, 1, team.thread, team.threads);
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t sample = unit / op.heads, offset = unit % op.heads * op.width;
    attend(op, op.qkv + sample * op.tokens * op.qkv_stride + 3 * offset,
           op.out + sample * op.tokens * op.out_stride + offset, head);
  }
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
