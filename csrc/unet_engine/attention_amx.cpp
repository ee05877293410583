// Attention with both of its products by tiles of bfloat16; scores, softmax and sums are float32.
//
// A head's keys and values are packed once, its queries come in blocks of 32.
#include "nhwc/amx_tile.h"
#include "unet_engine/plan.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

constexpr int64_t kQueries = 2 * kTileEdge;

IDDPM_NATIVE int64_t padded(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// One head's memory.
struct Head {
  int64_t tokens, width;   // as they are
  int64_t columns, depth;  // tokens and width in multiples of 32
  int64_t score_pitch;     // floats
  uint16_t* q;             // [columns][depth]
  uint16_t* k;             // [columns / 16][depth / 32][16][16][2], pairs of channels
  uint16_t* v;             // [depth / 16][columns / 32][16][16][2], pairs of tokens
  float* scores;           // [32][score_pitch]
  uint16_t* p;             // [32][2 * score_pitch]
  float* out;              // [32][depth]
  uint16_t* rows;          // [16][depth], rounded before they are packed

  Head(int64_t t, int64_t d, float* memory)
      : tokens(t), width(d), columns(padded(t, 32)), depth(padded(d, 32)) {
    score_pitch = columns + 16;
    const int64_t halves = columns * depth;
    q = reinterpret_cast<uint16_t*>(memory);
    k = q + halves;
    v = k + halves;
    scores = reinterpret_cast<float*>(v + halves);
    p = reinterpret_cast<uint16_t*>(scores + kQueries * score_pitch);
    out = scores + 2 * kQueries * score_pitch;
    rows = reinterpret_cast<uint16_t*>(out + kQueries * depth);
  }
};

// `width` floats times a factor -> `depth` halves, zeros after them.
IDDPM_NATIVE void round_row(const float* in, int64_t width, int64_t depth, float factor,
                            uint16_t* out) {
  for (int64_t c = 0; c < depth; c += kWidth)
    nstore(out + c, nload_first(in + c, width - c) * factor);
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
    uint16_t* k = head.k + first * depth;
    for (int64_t c = 0; c < depth; c += kTileDepth, k += kTileHalves)
      transpose_pairs(head.rows + c, depth, k);
  }
  for (int64_t token = 0; token < head.columns; token += 2) {
    const int64_t even_width = token < op.tokens ? d : 0, odd_width = token + 1 < op.tokens ? d : 0;
    const float* even = qkv + token * op.qkv_stride + 2 * d;
    const float* odd = even + op.qkv_stride;
    uint16_t* v = head.v + (token / kTileDepth * kTileEdge + token % kTileDepth / 2) * kTileDepth;
    for (int64_t c = 0; c < depth; c += kTileEdge, v += chunks * kTileHalves)
      for (int64_t j = 0; j < kTileEdge; j += kWidth)
        store_pairs(v + 2 * j, nload_first(even + c + j, even_width - c - j),
                    nload_first(odd + c + j, odd_width - c - j));
  }
}

// c [32, 16 * tiles] = a [32, 32 * chunks] * b [tiles][chunks], with strides in bytes; an even
// number of tiles.
void multiply(const uint16_t* a, int64_t a_stride, int64_t chunks, const uint16_t* b, int64_t tiles,
              float* c, int64_t c_stride) {
  const int64_t lower = kTileEdge * a_stride / 2;
  for (int64_t tile = 0; tile < tiles; tile += 2, c += 2 * kTileEdge) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    const uint16_t* left = b + tile * chunks * kTileHalves;
    const uint16_t* right = left + chunks * kTileHalves;
    for (int64_t k = 0; k < chunks; ++k) {
      tile_load<6>(left + k * kTileHalves, 64);
      tile_load<4>(a + k * kTileDepth, a_stride);
      tile_multiply<0, 4, 6>();
      tile_load<7>(right + k * kTileHalves, 64);
      tile_multiply<1, 4, 7>();
      tile_load<5>(a + lower + k * kTileDepth, a_stride);
      tile_multiply<2, 5, 6>();
      tile_multiply<3, 5, 7>();
    }
    float* below = c + kTileEdge * c_stride / int64_t{sizeof(float)};
    tile_store<0>(c, c_stride);
    tile_store<1>(c + kTileEdge, c_stride);
    tile_store<2>(below, c_stride);
    tile_store<3>(below + kTileEdge, c_stride);
  }
}

// p = 2^(scores - their maximum), rounded; returns one over the sum of what was not.
float soften(const Head& head, float* scores, uint16_t* p) {
  constexpr int64_t V = 2 * kWidth;
  for (int64_t j = head.tokens; j < head.columns; ++j) scores[j] = -1e30f;
  nv left = nload(scores), right = nload(scores + kWidth);
#pragma GCC unroll 2
  for (int64_t j = V; j < head.columns; j += V) {
    left = nmax(left, nload(scores + j));
    right = nmax(right, nload(scores + j + kWidth));
  }
  const nv maximum = nsplat(max_lanes(nmax(left, right)));
  left = right = nv{};
#pragma GCC unroll 2
  for (int64_t j = 0; j < head.columns; j += V) {
    const nv x = exp2_coarse(nload(scores + j) - maximum);
    const nv y = exp2_coarse(nload(scores + j + kWidth) - maximum);
    left += x;
    right += y;
    nstore(p + j, x, y);
  }
  return 1.0f / sum_lanes(left + right);
}

void attend(const TileAttentionOp& op, const float* qkv, uint16_t* out, const Head& head) {
  pack(op, qkv, head);
  const int64_t d = op.width, depth_bytes = 2 * head.depth, score_bytes = 4 * head.score_pitch;
  for (int64_t first = 0; first < op.tokens; first += kQueries) {
    multiply(head.q + first * head.depth, depth_bytes, head.depth / kTileDepth, head.k,
             head.columns / kTileEdge, head.scores, score_bytes);
    const int64_t count = smaller(kQueries, op.tokens - first);
    float inverse[kQueries];
    for (int64_t i = 0; i < count; ++i)
      inverse[i] =
          soften(head, head.scores + i * head.score_pitch, head.p + 2 * i * head.score_pitch);
    multiply(head.p, score_bytes, head.columns / kTileDepth, head.v, head.depth / kTileEdge,
             head.out, 4 * head.depth);
    for (int64_t i = 0; i < count; ++i) {
      const float* from = head.out + i * head.depth;
      uint16_t* to = out + (first + i) * op.out_stride;
      int64_t c = 0;
      for (; c + kWidth <= d; c += kWidth) nstore(to + c, nload(from + c) * inverse[i]);
      if (c < d) {
        uint16_t rest[kWidth];
        nstore(rest, nload(from + c) * inverse[i]);
        std::memcpy(to + c, rest, size_t(d - c) * 2);
      }
    }
  }
}

}  // namespace

int run_tile_attention(const TileAttentionOp& op, const Team& team) {
  if (tile_attention_workspace(op.tokens, op.width) > team.scratch_floats) return 1;
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
