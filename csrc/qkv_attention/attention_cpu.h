// The forward kernel, for the operator and for the CPU engine.
//
// A head at a time: keys in panels [ceil(T / 32)][d][32], values in rows padded to 16; a tile of
// query rows at a time, whose scores stay in L1. Output rows are multiplied by 1 / sum.
#pragma once

#include "common/simd_math.h"
#include "nhwc/panel.h"
#include "qkv_attention/head_matrix.h"
#include "qkv_attention/qkv_attention.h"

namespace iddpm {
namespace IDDPM_ISA {

// Below this many multiply-adds threads cost more than they save.
constexpr int64_t kAttentionSerialBelow = 1 << 20;

// Larger inputs, in bytes, do not stay in the L2 cache and are prefetched.
constexpr int64_t kSecondLevel = 1 << 20;

// log2(e) / sqrt(d): probabilities are powers of two of scaled scores, which is cheaper than e^x.
IDDPM_INLINE float score_scale(int64_t width) {
  return float(1.4426950408889634 / __builtin_sqrt(double(width)));
}

struct RowStatistics {
  float offset, factor;
};

// scores <- 2^(scale * scores + offset), with the offset for which the largest is one; factor is
// 1 / sum. Columns from `tokens` on become zero.
IDDPM_INLINE RowStatistics exponentiate(float* scores, int64_t tokens, float scale) {
  const int64_t padded = round_up(tokens, kAlign);
  for (int64_t t = tokens; t < padded; ++t) scores[t] = -__builtin_inff();
  nv most = load<nv>(scores);
  for (int64_t t = kWidth; t < padded; t += kWidth) most = max(load<nv>(scores + t), most);
  const float offset = -scale * largest(most);
  nv total = {};
  for (int64_t t = 0; t < padded; t += kWidth) {
    const nv e = exp2_bounded(load<nv>(scores + t) * scale + offset);
    total += e;
    store(scores + t, e);
  }
  return {offset, 1.0f / sum(total)};
}

// Memory to prefetch: the lines of matrices of one shape, at equal distances.
struct Ahead {
  const char* first;
  int64_t stride, bytes;  // from line to line; of a line
  int64_t lines, step;    // of a matrix; bytes from matrix to matrix
  int64_t total;          // lines of all matrices
};

template <typename T>
IDDPM_INLINE Ahead ahead(const HeadMatrix<T>& x, int64_t tokens, int64_t d, int64_t matrices,
                         int64_t step) {
  const int64_t size = sizeof(T), lines = x.by_token() ? tokens : d;
  return {reinterpret_cast<const char*>(x.data),
          size * (x.by_token() ? x.token : x.channel),
          size * (x.by_token() ? d : tokens),
          lines,
          size * step,
          matrices * lines};
}

// Prefetches the share `part` of `parts`. Inlined, because GCC drops calls that only prefetch.
IDDPM_INLINE void fetch(const Ahead& next, int64_t part, int64_t parts) {
  const int64_t end = next.total * (part + 1) / parts;
  for (int64_t i = next.total * part / parts; i < end; ++i) {
    const char* line = next.first + i / next.lines * next.step + i % next.lines * next.stride;
    for (int64_t b = 0; b < next.bytes; b += 64) __builtin_prefetch(line + b, 0, 2);
  }
}

// Rows of one head: q [rows][q_stride] -> out [rows][out_stride], d values each.
struct HeadRows {
  int64_t rows;
  const float* q;
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  float* offsets;  // [rows], or null
  float* factors;
  Ahead written, next;  // the result's memory, and the input of the next head
};

static inline void attend(const HeadRows& head, int64_t tokens, int64_t d, const float* keys,
                          const float* values, float* space) {
  const float scale = score_scale(d);
  const int64_t padded_tokens = round_up(tokens, kAlign), padded_d = round_up(d, kAlign);
  const int64_t pitch = padded_tokens + kAlign;  // no power of two, for different cache sets
  float* scores = space;
  float* result = space + kTileRows * pitch;
  const int64_t tiles = divide_up(head.rows, kTileRows);
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t end = head.rows * (tile + 1) / tiles, count = end - row;
    for (int64_t t = 0; t < padded_tokens; t += kPanel)
      multiply_panel(count, smaller(kPanel, padded_tokens - t), d, head.q + row * head.q_stride,
                     head.q_stride, keys + t * d, kPanel, scores + t, pitch, Addends{});
    RowStatistics row_statistics[kTileRows];
    // Prefetched here, where everything else is in L1.
    for (int64_t i = 0; i < count; ++i) {
      fetch(head.written, row + i, head.rows);
      fetch(head.next, row + i, head.rows);
      row_statistics[i] = exponentiate(scores + i * pitch, tokens, scale);
    }
    for (int64_t c = 0; c < padded_d; c += kPanel)
      multiply_panel(count, smaller(kPanel, padded_d - c), tokens, scores, pitch, values + c,
                     padded_d, result + c, padded_d, Addends{});
    for (int64_t i = 0; i < count; ++i) {
      const RowStatistics s = row_statistics[i];
      float* out = head.out + (row + i) * head.out_stride;
      for (int64_t c = 0; c < d; c += kLanes)
        store_some(out + c, load(result + i * padded_d + c) * s.factor, smaller(kLanes, d - c));
      if (head.offsets) {
        head.offsets[row + i] = s.offset;
        head.factors[row + i] = s.factor;
      }
    }
    row = end;
  }
}

// Query rows [first, first + rows) of head i of all samples' heads; another head follows unless it
// is the last.
template <typename T>
void attend_head(const QkvAttentionArgs& a, int64_t i, int64_t first, int64_t rows, bool last,
                 float* space) {
  const QkvAttentionInput& in = a.in;
  const int64_t tokens = in.tokens, d = in.width, padded_d = round_up(d, kAlign);
  float* keys = space;
  float* values = keys + attention_padded(tokens) * d;
  float* scores = values + tokens * padded_d;
  float* q_rows = scores + kTileRows * (round_up(tokens, kAlign) + kAlign + padded_d);
  float* out_rows = q_rows + rows * padded_d;

  const int64_t n = i / in.heads, h = i % in.heads;
  const auto part = [&](int64_t p) {
    return head_matrix<const T>(in.qkv, n, h * in.head_step + p * in.part_step);
  };
  read_panels(part(1), tokens, d, keys);
  read_rows(part(2), tokens, d, values, padded_d);

  const HeadMatrix<const T> q = part(0).from(first);
  const HeadMatrix<T> out = head_matrix<T>(a.out, n, h * d).from(first);
  HeadRows head{rows, q_rows, padded_d, out_rows, padded_d, nullptr, nullptr, {}, {}};
  if (in.statistics) {
    head.offsets = in.statistics + (n * in.heads + h) * 2 * tokens + first;
    head.factors = head.offsets + tokens;
  }
  if constexpr (sizeof(T) == 4) {
    if (q.by_token()) head.q = q.data, head.q_stride = q.token;
    if (out.by_token()) head.out = out.data, head.out_stride = out.token;
  }
  const int64_t bytes = in.n * in.heads * 3 * d * tokens * int64_t(sizeof(T));
  if (bytes > kSecondLevel) {
    head.written = ahead(out, rows, d, 1, 0);
    const auto following =
        head_matrix<const T>(in.qkv, (i + 1) / in.heads, (i + 1) % in.heads * in.head_step);
    if (!last) head.next = ahead(following, tokens, d, 3, in.part_step * in.qkv.channel);
  }
  if (head.q == q_rows) read_rows(q, rows, d, q_rows, padded_d);
  attend(head, tokens, d, keys, values, scores);
  if (head.out == out_rows) write_rows(out_rows, padded_d, rows, d, 1.0f, out);
}

// The share of one thread of `threads`: whole heads, or rows of every head if there are few heads.
template <typename T>
void attend_share(const QkvAttentionArgs& a, int64_t thread, int64_t threads, float* space) {
  const int64_t heads = a.in.n * a.in.heads, tokens = a.in.tokens;
  const bool by_head = heads >= threads;
  const int64_t first = by_head ? heads * thread / threads : 0;
  const int64_t last = by_head ? heads * (thread + 1) / threads : heads;
  const int64_t begin = by_head ? 0 : tokens * thread / threads;
  const int64_t end = by_head ? tokens : tokens * (thread + 1) / threads;
  if (begin == end) return;
  for (int64_t i = first; i < last; ++i)
    attend_head<T>(a, i, begin, end - begin, i + 1 == last, space);
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
