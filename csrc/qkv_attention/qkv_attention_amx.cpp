// Attention of bfloat16 with its products by tiles: q k^T of the values as they are, then the
// probabilities, rounded before they are divided by their sum, times v. Scores and sums are
// float32. A head's keys and values are packed once; 32 queries are computed at a time.
#include "common/threads.h"
#include "nhwc/tile_matrix.h"
#include "qkv_attention/attention_cpu.h"
#include "qkv_attention/attention_tiles.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

// scores of `tokens` keys -> p, 2^(scale * score + offset) rounded, up to `columns`.
RowStatistics soften(float* scores, int64_t tokens, int64_t columns, float scale, BFloat16* p) {
  for (int64_t t = tokens; t < columns; ++t) scores[t] = -__builtin_inff();
  nv most = load<nv>(scores);
  for (int64_t t = kWidth; t < columns; t += kWidth) most = max(load<nv>(scores + t), most);
  const float offset = -scale * largest(most);
  nv total[2] = {};
  for (int64_t t = 0; t < columns; t += 2 * kWidth) {
    nv e[2];
    IDDPM_UNROLL
    for (int i = 0; i < 2; ++i) {
      e[i] = exp2_coarse(load<nv>(scores + t + i * kWidth) * scale + offset);
      total[i] += e[i];
    }
    store_both(p + t, e[0], e[1]);
  }
  return {offset, 1.0f / sum(total[0] + total[1])};
}

struct Forward {
  const QkvAttentionArgs& a;
  const QkvAttentionInput& in;
  const AttentionTiles size;
  float *rows, *scores, *out;  // [tokens][width]; [32][pitch]; [32][width]
  BFloat16 *q, *k, *v, *p;     // p: [32][2 * pitch]
  int64_t pitch;

  Forward(const QkvAttentionArgs& args, float* space)
      : a(args), in(args.in), size(in.tokens, in.width), pitch(size.score_pitch()) {
    rows = size.take(space, size.tokens * size.width);
    q = size.take_halves(space, size.tokens * size.depth);
    k = size.take_halves(space, size.tokens * size.depth);
    v = size.take_halves(space, size.tokens * size.depth);
    scores = size.take(space, kQueries * pitch);
    p = reinterpret_cast<BFloat16*>(size.take(space, kQueries * pitch));
    out = size.take(space, kQueries * size.width);
  }

  void head(int64_t n, int64_t h) const {
    const int64_t tokens = in.tokens, d = in.width;
    const auto part = [&](int64_t i) {
      return head_matrix<const BFloat16>(in.qkv, n, h * in.head_step + i * in.part_step);
    };
    // q's place serves the keys first, which are packed from it.
    read_rows(part(1), tokens, d, rows, size.width);
    round_rows(rows, size.width, tokens, size.width, size.tokens, size.depth, q);
    pack_columns(q, size.tokens, size.depth, k);
    read_rows(part(2), tokens, d, rows, size.width);
    pack_rows(rows, size.width, tokens, size.width, size.tokens, v);
    read_rows(part(0), tokens, d, rows, size.width);
    round_rows(rows, size.width, tokens, size.width, size.tokens, size.depth, q);

    const float scale = score_scale(d);
    float* offsets = in.statistics ? in.statistics + (n * in.heads + h) * 2 * tokens : nullptr;
    const HeadMatrix<BFloat16> result = head_matrix<BFloat16>(a.out, n, h * d);
    for (int64_t first = 0; first < tokens; first += kQueries) {
      const int64_t count = smaller(kQueries, tokens - first);
      multiply_tiles(q + first * size.depth, 2 * size.depth, 2, size.depth / kTileDepth, k,
                     size.tokens / kTileEdge, scores, 4 * pitch, false);
      // Rows of p beyond the last query are whatever they were: they give rows that nobody reads.
      RowStatistics statistics[kQueries];
      for (int64_t i = 0; i < count; ++i)
        statistics[i] = soften(scores + i * pitch, tokens, size.tokens, scale, p + 2 * i * pitch);
      multiply_tiles(p, 4 * pitch, 2, size.tokens / kTileDepth, v, size.width / kTileEdge, out,
                     4 * size.width, false);
      for (int64_t i = 0; i < count; ++i) {
        float* row = out + i * size.width;
        for (int64_t c = 0; c < size.width; c += kLanes)
          store(row + c, load(row + c) * statistics[i].factor);
        if (!offsets) continue;
        offsets[first + i] = statistics[i].offset;
        offsets[tokens + first + i] = statistics[i].factor;
      }
      write_rows(out, size.width, count, d, 1.0f, result.from(first));
    }
  }
};

}  // namespace

void qkv_attention_tiles(const QkvAttentionArgs& args, int num_threads) {
  const QkvAttentionInput& in = args.in;
  const int64_t heads = in.n * in.heads;
  const int64_t work = 2 * heads * in.tokens * in.tokens * in.width;
  const int64_t floats = attention_workspace(in.tokens, in.width);
  for_threads(num_threads, work < kAttentionSerialBelow, [&](int64_t thread, int64_t threads) {
    const Forward forward(args, args.workspace + thread * floats);
    const Tiles tiles;
    const Range mine = share(heads, 1, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) forward.head(i / in.heads, i % in.heads);
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
