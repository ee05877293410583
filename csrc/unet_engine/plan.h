// The plan of one network evaluation: a list of operations over NHWC float32 buffers.
//
// Python lays out the buffers and writes one row of 16 64-bit words an operation; every thread of a
// team walks the list and takes its share of each operation. A buffer is a pointer and the distance
// between two pixels, so that a concatenation is two producers writing side by side.
// Weights are packed as [ceil(columns / 32)][depth][32] (`iddpm_ext/engines/cpu/pack.py`).
#pragma once

#include <cstdint>

namespace iddpm {

constexpr int64_t kOpWords = 16;

enum class Kind : int64_t {
  kInput = 0,
  kOutput = 1,
  kGemm = 2,
  kConv = 3,
  kWinograd = 4,
  kGroupNorm = 5,
  kAttention = 6,
  kGemmBf16 = 7,  // GemmOp and WinogradOp (of tile 2) whose operands are rounded to bfloat16:
  kWinogradBf16 =
      8,  // w is then bfloat16, [panels]...[C / 2][32][2]; everything else stays float32
};

// x [n, C, H, W] -> out [n, H, W, stride].
struct InputOp {
  int64_t kind, channels, pixels;
  float* out;
  int64_t out_stride;
};

// in [n, H, W, stride] -> x [n, C, H, W].
struct OutputOp {
  int64_t kind, channels, pixels;
  const float* in;
  int64_t in_stride;
};

// out = a * w + bias + residual; bias and residual may be null.
struct GemmOp {
  int64_t kind, rows;  // rows a sample
  const float* a;
  int64_t a_stride, depth, columns;
  const float* w;
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
};

// A 3 x 3 convolution with padding 1, as a matrix product over gathered rows of 9 C values.
struct ConvOp {
  int64_t kind, height, width;  // of the input before up-sampling
  const float* in;
  int64_t in_stride, channels, columns;
  const float* w;
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
  int64_t stride;   // 1 or 2
  int64_t upscale;  // 0, or 1: the input is doubled by nearest neighbour
};

// The same convolution with stride 1 by Winograd's F(m x m, 3 x 3). T, the element of images:
// float, or uint16_t for bfloat16.
template <class T>
struct WinogradConv {
  int64_t kind, height, width;  // of the convolution's output
  const T* in;
  int64_t in_stride, channels, columns;
  const float* w;  // [panels][(m + 2)^2][C][32]
  const float* bias;
  const T* residual;
  int64_t residual_stride;
  T* out;
  int64_t out_stride;
  int64_t tile;     // m: 2 or 4
  int64_t upscale;  // 0; 1: the input is doubled; -1: the output is summed over squares of 2 x 2
  int64_t block;    // tiles that are transformed at a time
};
using WinogradOp = WinogradConv<float>;

// out = act(GroupNorm(x (+ e)) * weight + bias (then * (1 + scale) + shift)).
struct GroupNormOp {
  int64_t kind, pixels;
  const float* in;
  int64_t in_stride, channels, groups;
  const float* weight;
  const float* bias;
  float* out;
  int64_t out_stride;
  int64_t embedding;  // offset in a sample's row of the embedding table; -1: none
  int64_t mode;       // with an embedding: 0 adds e before, 1 scales and shifts after
  int64_t silu;
  double eps;
};

// softmax(q k^T / sqrt(d)) v for every head; channels of qkv are [heads][q, k, v][d].
struct AttentionOp {
  int64_t kind, tokens, heads, width;
  const float* qkv;
  int64_t qkv_stride;
  float* out;
  int64_t out_stride;
};

static_assert(sizeof(ConvOp) <= 8 * kOpWords && sizeof(WinogradOp) <= 8 * kOpWords, "");
static_assert(sizeof(GroupNormOp) <= 8 * kOpWords, "");

struct PlanRun {
  const int64_t* ops;  // [count][kOpWords]
  int64_t count;
  int64_t n;  // samples
  int64_t threads;
  const float* input;            // [n, C, H, W]
  float* output;                 // [n, C_out, H, W]
  const float* embedding;        // table of embedding projections
  const int64_t* embedding_row;  // [n]: offset of each sample's row, in floats
  float* shared;                 // scratch of the team
  int64_t shared_floats;
  float* scratch;          // scratch of each thread, one after the other
  int64_t scratch_floats;  // a thread
};

}  // namespace iddpm
