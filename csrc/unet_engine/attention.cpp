// softmax(q k^T / sqrt(d)) v over NHWC rows, a head at a time and a tile of query rows at a time.
//
// Keys are transposed into panels [ceil(T / 32)][d][32] and values copied to rows padded to 16 once
// a head; a tile's scores stay in the first cache level, and 1 / sum is applied to the output row.
#if defined(__AVX2__)
#include "team.h"
#include "tile.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

constexpr int64_t kAlign = 16;

int64_t round_up(int64_t a) { return (a + kAlign - 1) / kAlign * kAlign; }

// Lanes of a and b that two interleaving steps of a transposition need; see transpose_square.
template <int H>
IDDPM_NATIVE void exchange(nv& a, nv& b) {
  typedef int32_t lanes __attribute__((vector_size(4 * kWidth)));
  lanes low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i & H ? int(kWidth) + i - H : i;
    high[i] = i & H ? int(kWidth) + i : i + H;
  }
  const nv first = __builtin_shuffle(a, b, low), second = __builtin_shuffle(a, b, high);
  a = first;
  b = second;
}

template <int H>
IDDPM_NATIVE void exchange_rows(nv (&m)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i)
    if (!(i & H)) exchange<H>(m[i], m[i + H]);
}

// Transposes a kWidth x kWidth square: swaps off-diagonal blocks of every size from the largest
// down.
IDDPM_NATIVE void transpose_square(nv (&m)[kWidth]) {
#if defined(__AVX512F__)
  exchange_rows<8>(m);
#endif
  exchange_rows<4>(m);
  exchange_rows<2>(m);
  exchange_rows<1>(m);
}

// keys [panels][d][32] from rows of k; tokens beyond the last are zero.
void pack_keys(const float* k, int64_t stride, int64_t tokens, int64_t d, float* keys) {
  for (int64_t t = 0; t < round_up(tokens); t += kWidth) {
    float* panel = keys + t / kPanel * kPanel * d + t % kPanel;
    for (int64_t c = 0; c < d; c += kWidth) {
      nv square[kWidth];
      if (t + kWidth <= tokens) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) square[i] = nload(k + (t + i) * stride + c);
      } else {
        for (int i = 0; i < kWidth; ++i)
          square[i] = t + i < tokens ? nload(k + (t + i) * stride + c) : nv{};
      }
      transpose_square(square);
      const int64_t rows = smaller(kWidth, d - c);
      for (int64_t i = 0; i < rows; ++i) nstore(panel + (c + i) * kPanel, square[i]);
    }
  }
}

void pack_values(const float* v, int64_t stride, int64_t tokens, int64_t d, float* values) {
  const int64_t padded = round_up(d);
  for (int64_t t = 0; t < tokens; ++t) {
    std::memcpy(values + t * padded, v + t * stride, size_t(d) * sizeof(float));
    for (int64_t c = d; c < padded; ++c) values[t * padded + c] = 0.0f;
  }
}

IDDPM_NATIVE float sum_lanes(nv v) {
  float lane[kWidth];
  nstore(lane, v);
  for (int64_t width = kWidth / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

IDDPM_NATIVE float max_lanes(nv v) {
  float lane[kWidth];
  nstore(lane, v);
  float most = lane[0];
  for (int64_t i = 1; i < kWidth; ++i) most = lane[i] > most ? lane[i] : most;
  return most;
}

// scores <- exp(scale * (scores - max)); returns 1 / sum. Columns from `tokens` on become zero.
float exponentiate(float* scores, int64_t tokens, float scale) {
  const int64_t padded = round_up(tokens);
  for (int64_t t = tokens; t < padded; ++t) scores[t] = -__builtin_inff();
  nv most = nload(scores);
  for (int64_t t = kWidth; t < padded; t += kWidth) most = nmax(most, nload(scores + t));
  const float offset = -scale * max_lanes(most);
  nv total = {};
  for (int64_t t = 0; t < padded; t += kWidth) {
    const nv e = exp_bounded(nload(scores + t) * scale + offset);
    total += e;
    nstore(scores + t, e);
  }
  return 1.0f / sum_lanes(total);
}

struct Head {
  const float* q;
  float* out;
  const float* keys;
  const float* values;
};

void attend(const AttentionOp& op, const Head& head, Range rows, float scale, float* scores,
            float* result) {
  const int64_t tokens = op.tokens, d = op.width;
  const int64_t padded_tokens = round_up(tokens), padded_d = round_up(d);
  const int64_t pitch = padded_tokens + kAlign;
  for (int64_t row = rows.begin; row < rows.end; row += kTileRows) {
    const int64_t count = smaller(kTileRows, rows.end - row);
    for (int64_t t = 0; t < padded_tokens; t += kPanel)
      multiply_panel(count, smaller(kPanel, padded_tokens - t), d, head.q + row * op.qkv_stride,
                     op.qkv_stride, head.keys + t * d, kPanel, scores + t, pitch, Addends{});
    float inverse[kTileRows];
    for (int64_t i = 0; i < count; ++i)
      inverse[i] = exponentiate(scores + i * pitch, tokens, scale);
    for (int64_t c = 0; c < padded_d; c += kPanel)
      multiply_panel(count, smaller(kPanel, padded_d - c), tokens, scores, pitch, head.values + c,
                     padded_d, result + c, padded_d, Addends{});
    for (int64_t i = 0; i < count; ++i) {
      float* out = head.out + (row + i) * op.out_stride;
      for (int64_t c = 0; c < d; ++c) out[c] = result[i * padded_d + c] * inverse[i];
    }
  }
}

}  // namespace

int run_attention(const AttentionOp& op, const Team& team) {
  const int64_t tokens = op.tokens, d = op.width, heads = op.heads * team.n;
  const int64_t padded_tokens = round_up(tokens), padded_d = round_up(d);
  const int64_t key_floats = (tokens + kPanel - 1) / kPanel * kPanel * d;
  const int64_t value_floats = tokens * padded_d;
  const int64_t score_floats = kTileRows * (padded_tokens + kAlign);
  if (key_floats + value_floats + score_floats + kTileRows * padded_d > team.scratch_floats)
    return 1;
  float* keys = team.scratch;
  float* values = keys + key_floats;
  float* scores = values + value_floats;
  const float scale = float(1.0 / __builtin_sqrt(double(d)));
  const bool by_head = heads >= team.threads;
  const Range mine = by_head ? share(heads, 1, team.thread, team.threads) : Range{0, heads};
  const Range rows =
      by_head ? Range{0, tokens} : share(tokens, kTileRows, team.thread, team.threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t sample = i / op.heads, head = i % op.heads;
    const float* q = op.qkv + sample * tokens * op.qkv_stride + head * 3 * d;
    pack_keys(q + d, op.qkv_stride, tokens, d, keys);
    pack_values(q + 2 * d, op.qkv_stride, tokens, d, values);
    float* out = op.out + sample * tokens * op.out_stride + head * d;
    attend(op, Head{q, out, keys, values}, rows, scale, scores, scores + score_floats);
  }
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
