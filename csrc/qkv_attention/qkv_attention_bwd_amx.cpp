// The gradient of attention of bfloat16, all five products by tiles. With p the probabilities,
// which are computed again, and s = p (dout v^T - sum of p dout v^T) the slopes of the scores:
//
//   dv^T = dout^T p,   dk^T = q^T s / sqrt(d),   dq = s k / sqrt(d).
//
// p and s of a block of queries are kept, rounded, as the second operand of the first two, which
// pairs neighbouring queries; 32 rows of s are the first operand of the last.
#include "common/threads.h"
#include "nhwc/tile_matrix.h"
#include "qkv_attention/attention_cpu.h"
#include "qkv_attention/attention_tiles.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

struct Backward {
  const QkvAttentionBwdArgs& a;
  const QkvAttentionInput& in;
  const AttentionTiles size;
  int64_t pitch;
  float scale, final_scale;
  float *rows, *dk, *dv;                          // [tokens][width]; transposed: [width][tokens]
  BFloat16 *halves, *k, *k_rows, *v;              // [tokens][depth]; second operands
  BFloat16 *q, *dout, *q_columns, *dout_columns;  // of a block: [block][depth], [width][block]
  BFloat16 *p, *s;                                // of a block: second operands
  float *scores, *slopes, *dq;                    // of 32 queries
  BFloat16* s_rows;                               // [32][2 * pitch]

  Backward(const QkvAttentionBwdArgs& args, float* space)
      : a(args),
        in(args.in),
        size(in.tokens, in.width),
        pitch(size.score_pitch()),
        scale(score_scale(in.width)),
        final_scale(float(1.0 / __builtin_sqrt(double(in.width)))) {
    const int64_t tokens = size.tokens, block = size.block();
    float** const of_head[] = {&rows, &dk, &dv};
    for (float** piece : of_head) *piece = size.take(space, tokens * size.width);
    BFloat16** const operands[] = {&halves, &k, &v};
    for (BFloat16** piece : operands) *piece = size.take_halves(space, tokens * size.depth);
    k_rows = size.take_halves(space, tokens * size.width);
    BFloat16** const by_query[] = {&q, &dout};
    for (BFloat16** piece : by_query) *piece = size.take_halves(space, block * size.depth);
    BFloat16** const by_channel[] = {&q_columns, &dout_columns};
    for (BFloat16** piece : by_channel) *piece = size.take_halves(space, block * size.width);
    BFloat16** const by_pair[] = {&p, &s};
    for (BFloat16** piece : by_pair) *piece = size.take_halves(space, block * tokens);
    float** const of_queries[] = {&scores, &slopes};
    for (float** piece : of_queries) *piece = size.take(space, kQueries * pitch);
    s_rows = reinterpret_cast<BFloat16*>(size.take(space, kQueries * pitch));
    dq = size.take(space, kQueries * size.width);
  }

  // Rows [0, count) of x, as they are and transposed; zeros up to `padded`.
  void read_both(const HeadMatrix<const BFloat16>& x, int64_t count, int64_t padded,
                 BFloat16* by_row, BFloat16* by_column) const {
    read_rows(x, count, in.width, rows, size.width);
    round_rows(rows, size.width, count, size.width, padded, size.depth, by_row);
    const int64_t length = round_up(count, kLanes);
    read_rows(x.transposed(), in.width, count, rows, length);
    round_rows(rows, length, in.width, length, size.width, padded, by_column);
  }

  // Scores to probabilities; returns the sum of p dp. What lies beyond the last token becomes zero.
  float make_probabilities(float* probability, const float* slope, float offset,
                           float factor) const {
    for (int64_t t = in.tokens; t < size.tokens; ++t) probability[t] = -__builtin_inff();
    nv total = {};
    for (int64_t t = 0; t < size.tokens; t += kWidth) {
      const nv e = exp2_coarse(load<nv>(probability + t) * scale + offset) * factor;
      store(probability + t, e);
      total += e * load<nv>(slope + t);
    }
    return sum(total);
  }

  // Two neighbouring rows of p and s, the second of which may be none, to where products read them.
  void write_pair(int64_t row, const float (&means)[2], BFloat16* p_pair, BFloat16* s_pair,
                  int64_t column_step) const {
    for (int64_t t = 0; t < size.tokens;
         t += kLanes, p_pair += column_step, s_pair += column_step) {
      vf e[2], slope[2];
      IDDPM_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t at = (row + i) * pitch + t;
        e[i] = load(scores + at);
        slope[i] = e[i] * (load(slopes + at) - means[i]);
        store(s_rows + 2 * (row + i) * pitch + t, slope[i]);
      }
      store_pairs(p_pair, e[0], e[1]);
      store_pairs(s_pair, slope[0], slope[1]);
    }
  }

  // Queries [first, first + 32) of a block of `padded` that begins at query `row`.
  void add_queries(int64_t row, int64_t first, int64_t padded, const float* offsets,
                   const HeadMatrix<BFloat16>& gradient) const {
    const int64_t chunks = size.depth / kTileDepth, columns = size.tokens / kTileEdge;
    multiply_tiles(q + first * size.depth, 2 * size.depth, 2, chunks, k, columns, scores, 4 * pitch,
                   false);
    multiply_tiles(dout + first * size.depth, 2 * size.depth, 2, chunks, v, columns, slopes,
                   4 * pitch, false);
    const int64_t count = smaller(kQueries, in.tokens - row - first);
    // What is no query has no probabilities; its slopes are zero as dout is.
    if (count < kQueries)
      std::memset(scores + count * pitch, 0, size_t((kQueries - count) * pitch) * sizeof(float));
    for (int64_t i = 0; i < kQueries; i += 2) {
      float means[2] = {};
      for (int64_t j = 0; j < 2 && i + j < count; ++j) {
        const float* statistics = offsets + row + first + i + j;
        means[j] = make_probabilities(scores + (i + j) * pitch, slopes + (i + j) * pitch,
                                      statistics[0], statistics[in.tokens]);
      }
      const int64_t pair = (first * kTileEdge / kTileDepth + i / 2) * kTileDepth;
      write_pair(i, means, p + pair, s + pair, padded * kTileEdge);
    }
    multiply_tiles(s_rows, 4 * pitch, 2, size.tokens / kTileDepth, k_rows, size.width / kTileEdge,
                   dq, 4 * size.width, false);
    write_rows(dq, size.width, count, in.width, final_scale, gradient.from(row + first));
  }

  void head(int64_t n, int64_t h) const {
    const float* offsets = in.statistics + (n * in.heads + h) * 2 * in.tokens;
    const int64_t tokens = in.tokens, d = in.width;
    const auto channel = [&](int64_t part) { return h * in.head_step + part * in.part_step; };
    const auto part = [&](int64_t i) { return head_matrix<const BFloat16>(in.qkv, n, channel(i)); };
    const auto gradient = [&](int64_t i) { return head_matrix<BFloat16>(a.dqkv, n, channel(i)); };
    const HeadMatrix<const BFloat16> upstream = head_matrix<const BFloat16>(a.dout, n, h * d);

    read_rows(part(1), tokens, d, rows, size.width);
    pack_rows(rows, size.width, tokens, size.width, size.tokens, k_rows);
    round_rows(rows, size.width, tokens, size.width, size.tokens, size.depth, halves);
    pack_columns(halves, size.tokens, size.depth, k);
    read_rows(part(2), tokens, d, rows, size.width);
    round_rows(rows, size.width, tokens, size.width, size.tokens, size.depth, halves);
    pack_columns(halves, size.tokens, size.depth, v);
    for (int64_t row = 0; row < tokens; row += size.block()) {
      const int64_t count = smaller(size.block(), tokens - row), padded = round_up(count, kQueries);
      read_both(part(0).from(row), count, padded, q, q_columns);
      read_both(upstream.from(row), count, padded, dout, dout_columns);
      for (int64_t first = 0; first < count; first += kQueries)
        add_queries(row, first, padded, offsets, gradient(0));
      const int64_t edge = size.width / kTileEdge, columns = size.tokens / kTileEdge;
      multiply_tiles(dout_columns, 2 * padded, edge, padded / kTileDepth, p, columns, dv,
                     4 * size.tokens, row > 0);
      multiply_tiles(q_columns, 2 * padded, edge, padded / kTileDepth, s, columns, dk,
                     4 * size.tokens, row > 0);
    }
    write_rows(dk, size.tokens, d, tokens, final_scale, gradient(1).transposed());
    write_rows(dv, size.tokens, d, tokens, 1.0f, gradient(2).transposed());
  }
};

}  // namespace

void qkv_attention_bwd_tiles(const QkvAttentionBwdArgs& args, int num_threads) {
  const QkvAttentionInput& in = args.in;
  const int64_t heads = in.n * in.heads;
  const int64_t work = 5 * heads * in.tokens * in.tokens * in.width;
  const int64_t floats = attention_bwd_workspace(in.tokens, in.width);
  for_threads(num_threads, work < kAttentionSerialBelow, [&](int64_t thread, int64_t threads) {
    const Backward backward(args, args.workspace + thread * floats);
    const Tiles tiles;
    const Range mine = share(heads, 1, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) backward.head(i / in.heads, i % in.heads);
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
