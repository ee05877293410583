// With P the probabilities and dP = dout v^T:
//   dS = P (dP - sum_j P dP),   dq = dS k / sqrt(d),   dk = dS^T q / sqrt(d),   dv = P^T dout.
// P is recomputed from the forward pass's statistics, in whole rows for a block of queries at a
// time: so the sum is accurate even if a probability is close to one, unlike dout . out. A head is
// computed by one thread, and its blocks are added up in a fixed order.
#include "common/threads.h"
#include "qkv_attention/attention_cpu.h"
#include "qkv_attention/qkv_attention.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

template <typename T>
struct Backward {
  const QkvAttentionBwdArgs& a;
  const QkvAttentionInput& in;
  int64_t tokens, d, padded_tokens, padded_d, block, pitch;
  float scale, final_scale;
  float *k, *key_panels, *value_panels, *dk, *dv;  // of a head
  float *q, *dout, *dq;                            // [block][padded_d]
  float *p, *ds;                                   // [block][pitch]

  Backward(const QkvAttentionBwdArgs& args, float* space)
      : a(args),
        in(args.in),
        tokens(in.tokens),
        d(in.width),
        padded_tokens(round_up(tokens, kAlign)),
        padded_d(round_up(d, kAlign)),
        block(attention_block(tokens)),
        pitch(padded_tokens + kAlign),  // no power of two, for different cache sets
        scale(score_scale(d)),
        final_scale(float(1.0 / __builtin_sqrt(double(d)))) {
    const auto take = [&](int64_t floats) {
      float* taken = space;
      space += floats;
      return taken;
    };
    float** const of_head[] = {&k, &key_panels, &value_panels, &dk, &dv};
    for (float** rows : of_head) *rows = take(attention_padded(tokens) * padded_d);
    float** const of_block[] = {&q, &dout, &dq};
    for (float** rows : of_block) *rows = take(block * padded_d);
    p = take(block * pitch);
    ds = take(block * pitch);
  }

  // c [rows, d] (+)= a b, or a^T b, for a block a of probabilities or slopes.
  template <bool kTransposed>
  void multiply(int64_t rows, int64_t depth, const float* a, const float* b, float* c,
                bool add) const {
    for (int64_t j = 0; j < padded_d; j += kPanel)
      multiply_panel<kTransposed>(rows, smaller(kPanel, padded_d - j), depth, a, pitch, b + j,
                                  padded_d, c + j, padded_d,
                                  add ? Addends{nullptr, c + j, padded_d} : Addends{});
  }

  // Turns a row of scores into probabilities, and one of dP into dS. Values beyond the last token
  // are not used later, but must not contribute to the sum.
  void make_row(float* probability, float* slope, float offset, float factor) const {
    nv total = {};
    for (int64_t t = tokens; t < padded_tokens; ++t) probability[t] = -__builtin_inff();
    for (int64_t t = 0; t < padded_tokens; t += kWidth) {
      const nv e = exp2_bounded(load<nv>(probability + t) * scale + offset) * factor;
      store(probability + t, e);
      total += e * load<nv>(slope + t);
    }
    const float mean = sum(total);
    for (int64_t t = 0; t < padded_tokens; t += kWidth)
      store(slope + t, load<nv>(probability + t) * (load<nv>(slope + t) - mean));
  }

  // dq of `rows` queries, and their contributions to dk and dv, which the first block overwrites.
  void add_block(int64_t rows, const float* offsets, const float* factors, bool first) const {
    for (int64_t t = 0; t < padded_tokens; t += kPanel) {
      const int64_t columns = smaller(kPanel, padded_tokens - t);
      multiply_panel(rows, columns, d, q, padded_d, key_panels + t * d, kPanel, p + t, pitch,
                     Addends{});
      multiply_panel(rows, columns, d, dout, padded_d, value_panels + t * d, kPanel, ds + t, pitch,
                     Addends{});
    }
    for (int64_t i = 0; i < rows; ++i)
      make_row(p + i * pitch, ds + i * pitch, offsets[i], factors[i]);
    multiply<true>(tokens, rows, p, dout, dv, !first);
    multiply<true>(tokens, rows, ds, q, dk, !first);
    multiply<false>(rows, tokens, ds, k, dq, false);
  }

  void head(int64_t n, int64_t h) const {
    const float* offsets = in.statistics + (n * in.heads + h) * 2 * tokens;
    const float* factors = offsets + tokens;
    const auto channel = [&](int64_t part) { return h * in.head_step + part * in.part_step; };
    const auto part = [&](int64_t i) { return head_matrix<const T>(in.qkv, n, channel(i)); };
    const auto gradient = [&](int64_t i) { return head_matrix<T>(a.dqkv, n, channel(i)); };
    const HeadMatrix<const T> upstream = head_matrix<const T>(a.dout, n, h * d);

    read_rows(part(1), tokens, d, k, padded_d);
    read_panels(part(1), tokens, d, key_panels);
    read_panels(part(2), tokens, d, value_panels);
    const int64_t blocks = divide_up(tokens, block);
    for (int64_t i = 0, row = 0; i < blocks; ++i) {
      const int64_t end = tokens * (i + 1) / blocks, rows = end - row;
      read_rows(part(0).from(row), rows, d, q, padded_d);
      read_rows(upstream.from(row), rows, d, dout, padded_d);
      add_block(rows, offsets + row, factors + row, i == 0);
      write_rows(dq, padded_d, rows, d, final_scale, gradient(0).from(row));
      row = end;
    }
    write_rows(dk, padded_d, tokens, d, final_scale, gradient(1));
    write_rows(dv, padded_d, tokens, d, 1.0f, gradient(2));
  }
};

template <typename T>
void run(const QkvAttentionBwdArgs& a, int num_threads) {
  const QkvAttentionInput& in = a.in;
  const int64_t heads = in.n * in.heads;
  const int64_t work = 5 * heads * in.tokens * in.tokens * in.width;
  const int64_t floats = attention_bwd_workspace(in.tokens, in.width);
  for_threads(num_threads, work < kAttentionSerialBelow, [&](int64_t thread, int64_t threads) {
    const Backward<T> backward(a, a.workspace + thread * floats);
    for (int64_t i = heads * thread / threads; i < heads * (thread + 1) / threads; ++i)
      backward.head(i / in.heads, i % in.heads);
  });
}

}  // namespace

void qkv_attention_bwd(const QkvAttentionBwdArgs& args, int num_threads) {
  const auto tiles = IDDPM_AMX(qkv_attention_bwd_tiles);
  if (tiles && args.in.dtype == DType::kBFloat16) return tiles(args, num_threads);
  with_element(args.in.dtype, [&](auto element) { run<decltype(element)>(args, num_threads); });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
