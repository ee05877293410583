// out = softmax(q^T k / sqrt(d)) v for every head of every sample, and its gradient.
//
// qkv is [N, 3C, T], out is [N, C, T], C = heads * d. In each tensor either the channels of a token
// are adjacent (channels_last: channel stride 1) or the tokens of a channel (pixel stride 1).
#pragma once

#include <cstdint>

#include "common/amx.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "qkv_attention/attention_tiles.h"

namespace iddpm {

struct QkvAttentionInput {
  int64_t n, tokens, heads, width;
  // Channels from head to head, and from q to k to v: 3d and d in the legacy order, d and C in the
  // new one.
  int64_t head_step, part_step;
  DType dtype;  // of every tensor but the statistics
  Plane qkv;
  // [N, heads, 2, T]: offset and factor, with which a probability is 2^(score * scale log2(e) +
  // offset) * factor. The two numbers keep large scores exact where their logarithm would not.
  float* statistics;
};

struct QkvAttentionArgs {
  QkvAttentionInput in;  // statistics may be null
  Plane out;
  float* workspace;  // attention_workspace(tokens, width) floats for each thread
};

struct QkvAttentionBwdArgs {
  QkvAttentionInput in;
  Plane dout;
  Plane dqkv;
  float* workspace;  // attention_bwd_workspace(tokens, width) floats for each thread
};

// Rows of probabilities that the backward pass computes at a time, so that they fit into L2.
inline int64_t attention_block(int64_t tokens) { return tokens <= 512 ? 64 : 32; }

inline int64_t attention_padded(int64_t a) { return (a + 31) / 32 * 32; }

// For either of the kernels. q, keys, values and the result of a head, and the scores of a few
// rows.
inline int64_t attention_workspace(int64_t tokens, int64_t width) {
  const int64_t t = attention_padded(tokens), d = attention_padded(width);
  const int64_t vectors = 4 * t * d + 16 * (t + 16 + d);
  return larger(vectors, AttentionTiles(tokens, width).forward_floats());
}

// k twice, v, dk and dv of a head; q, dout, dq and two rows of scores for each query of a block.
inline int64_t attention_bwd_workspace(int64_t tokens, int64_t width) {
  const int64_t t = attention_padded(tokens), d = attention_padded(width);
  const int64_t vectors = 5 * t * d + attention_block(tokens) * (3 * d + 2 * (t + 16));
  return larger(vectors, AttentionTiles(tokens, width).backward_floats());
}

}  // namespace iddpm

IDDPM_DECLARE_CPU(void, qkv_attention, (const iddpm::QkvAttentionArgs& args, int num_threads))
IDDPM_DECLARE_CPU(void, qkv_attention_bwd,
                  (const iddpm::QkvAttentionBwdArgs& args, int num_threads))
IDDPM_DECLARE_AMX(void, qkv_attention_tiles, (const iddpm::QkvAttentionArgs& args, int num_threads))
IDDPM_DECLARE_AMX(void, qkv_attention_bwd_tiles,
                  (const iddpm::QkvAttentionBwdArgs& args, int num_threads))
