// With P the probabilities, dP = dout v^T and D_i = sum_c dout_ic out_ic:
//   dS = P (dP - D),   dq = dS k / sqrt(d),   dk = dS^T q / sqrt(d),   dv = P^T dout.
// P is computed again from the forward pass's statistics, a square of queries and keys at a time. A
// head belongs to one thread, and its squares are added up in a fixed order.
#include "qkv_attention/attention_cpu.h"
#include "qkv_attention/qkv_attention.h"
#include "qkv_attention/threads.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

constexpr int64_t kPitch = kAttentionBlock + kAlign;

// c (+)= a b, or a^T b, for c [rows, columns]: columns a multiple of 16, b and c with one stride.
template <bool kTransposed>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, const float* b,
              float* c, int64_t stride, bool add) {
  for (int64_t j = 0; j < columns; j += kPanel)
    multiply_panel<kTransposed>(rows, smaller(kPanel, columns - j), depth, a, kPitch, b + j, stride,
                                c + j, stride, add ? Addends{nullptr, c + j, stride} : Addends{});
}

template <typename T>
struct Backward {
  const QkvAttentionBwdArgs& a;
  const QkvAttentionInput& in;
  int64_t tokens, d, padded_d;
  float *q, *dout, *dq, *delta;                    // [tokens][padded_d]; [tokens]
  float *k, *key_panels, *value_panels, *dk, *dv;  // of a block of keys
  float *p, *ds;                                   // [kAttentionBlock][kPitch]
  float scale = score_scale(in.width), final_scale = float(1.0 / __builtin_sqrt(double(in.width)));

  Backward(const QkvAttentionBwdArgs& args, float* space)
      : a(args), in(args.in), tokens(in.tokens), d(in.width), padded_d(round_up(d)) {
    const auto take = [&](int64_t floats) {
      float* taken = space;
      space += floats;
      return taken;
    };
    float** const of_head[] = {&q, &dout, &dq};
    for (float** rows : of_head) *rows = take(tokens * padded_d);
    float** const of_block[] = {&k, &key_panels, &value_panels, &dk, &dv};
    for (float** rows : of_block) *rows = take(kAttentionBlock * padded_d);
    p = take(kAttentionBlock * kPitch);
    ds = take(kAttentionBlock * kPitch);
    delta = take(tokens);
  }

  HeadMatrix<const T> read(const Plane& plane, int64_t n, int64_t channel) const {
    return head_matrix<const T>(plane, n, channel);
  }

  // D_i, with `out` read to where dq will be.
  void make_delta(int64_t n, int64_t h) const {
    read_rows(read(a.out, n, h * d), tokens, d, dq, padded_d);
    for (int64_t t = 0; t < tokens; ++t) {
      nv total = {};
      for (int64_t c = 0; c < padded_d; c += kWidth)
        total += nload(dout + t * padded_d + c) * nload(dq + t * padded_d + c);
      delta[t] = sum_lanes(total);
    }
  }

  // p <- P and ds <- dS, from scores in p and dP in ds.
  void make_square(int64_t rows, int64_t columns, const float* offsets, const float* factors,
                   const float* row_delta) const {
    for (int64_t i = 0; i < rows; ++i) {
      const float offset = offsets[i], factor = factors[i], less = row_delta[i];
      for (int64_t j = 0; j < columns; j += kWidth) {
        float *probability = p + i * kPitch + j, *slope = ds + i * kPitch + j;
        const nv e = exp2_bounded(nload(probability) * scale + offset) * factor;
        nstore(probability, e);
        nstore(slope, e * (nload(slope) - less));
      }
    }
  }

  // Adds what queries [row, row + rows) and the current block of keys give each other.
  void add_square(int64_t row, int64_t rows, int64_t keys, const float* statistics,
                  bool first_keys) const {
    const int64_t columns = round_up(keys);
    const float *q_rows = q + row * padded_d, *dout_rows = dout + row * padded_d;
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t width = smaller(kPanel, columns - j);
      multiply_panel(rows, width, d, q_rows, padded_d, key_panels + j * d, kPanel, p + j, kPitch,
                     Addends{});
      multiply_panel(rows, width, d, dout_rows, padded_d, value_panels + j * d, kPanel, ds + j,
                     kPitch, Addends{});
    }
    make_square(rows, columns, statistics + row, statistics + tokens + row, delta + row);
    multiply<true>(keys, padded_d, rows, p, dout_rows, dv, padded_d, row > 0);
    multiply<true>(keys, padded_d, rows, ds, q_rows, dk, padded_d, row > 0);
    multiply<false>(rows, padded_d, keys, ds, k, dq + row * padded_d, padded_d, !first_keys);
  }

  void head(int64_t n, int64_t h) const {
    const float* statistics = in.statistics + (n * in.heads + h) * 2 * tokens;
    const auto channel = [&](int64_t part) { return h * in.head_step + part * in.part_step; };
    const auto gradient = [&](int64_t part) { return head_matrix<T>(a.dqkv, n, channel(part)); };
    read_rows(read(in.qkv, n, channel(0)), tokens, d, q, padded_d);
    read_rows(read(a.dout, n, h * d), tokens, d, dout, padded_d);
    make_delta(n, h);

    const int64_t blocks = (tokens + kAttentionBlock - 1) / kAttentionBlock;
    const auto edge = [&](int64_t block) { return tokens * block / blocks; };
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t key = edge(i), keys = edge(i + 1) - key;
      const HeadMatrix<const T> k_block = read(in.qkv, n, channel(1)).from(key);
      read_rows(k_block, keys, d, k, padded_d);
      read_panels(k_block, keys, d, key_panels);
      read_panels(read(in.qkv, n, channel(2)).from(key), keys, d, value_panels);
      for (int64_t j = 0; j < blocks; ++j)
        add_square(edge(j), edge(j + 1) - edge(j), keys, statistics, i == 0);
      write_rows(dk, padded_d, keys, d, final_scale, gradient(1).from(key));
      write_rows(dv, padded_d, keys, d, 1.0f, gradient(2).from(key));
    }
    write_rows(dq, padded_d, tokens, d, final_scale, gradient(0));
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
  switch (args.in.dtype) {
    case DType::kFloat32:
      return run<float>(args, num_threads);
    case DType::kBFloat16:
      return run<BFloat16>(args, num_threads);
    case DType::kFloat16:
      return run<Float16>(args, num_threads);
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
