// The plan of one network evaluation: a list of operations over NHWC float32 buffers.
//
// Python lays out the buffers and writes one row of 18 64-bit words per operation: its kind and the
// kind's struct; the last word is 0 for all samples, or the first sample, shifted by 32, and the
// number of samples. Every thread of a team executes the list and takes its share of each
// operation. A buffer is a pointer and the distance from pixel to pixel, so that a concatenation is
// written by two producers into one buffer.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "nhwc/conv.h"
#include "nhwc/gemm.h"
#include "nhwc/tile_product.h"
#include "nhwc/winograd.h"

namespace iddpm {

constexpr int64_t kOpWords = 18;

// One kind per algorithm. Python uses the binding's RowKind, which must list them too.
enum class Kind : int64_t {
  kInput,
  kOutput,
  kGemm,
  kConv,
  kWinograd,
  kGroupNorm,
  kAttention,
  // GemmOp and WinogradOp (with tile 2) with operands rounded to bfloat16: w is bfloat16,
  // [panels]...[C / 2][32][2], and everything else float32.
  kGemmBf16,
  kWinogradBf16,
  // By AMX, with bfloat16 operands: nhwc/tile_product.h, and below.
  kTileProduct,
  kNormOperand,
  kRound,
  kTileAttention,
};

// x [n, C, H, W] -> out [n, H, W, stride].
struct InputOp {
  int64_t channels, pixels;
  float* out;
  int64_t out_stride;
};

// in [n, H, W, stride] -> x [n, C, H, W].
struct OutputOp {
  int64_t channels, pixels;
  const float* in;
  int64_t in_stride;
};

// act(GroupNorm(x (+ e)) * weight + bias (then * (1 + scale) + shift)).
struct Normalization {
  int64_t pixels;
  const float* in;
  int64_t in_stride, channels, groups;
  const float* weight;
  const float* bias;
  int64_t embedding;  // offset in a sample's row of the embedding table; -1: none
  int64_t mode;       // with an embedding: 0 adds e before, 1 scales and shifts after
  int64_t silu;
  double eps;
};

struct GroupNormOp {
  Normalization of;
  float* out;
  int64_t out_stride;
};

// The same, rounded to bfloat16 into an operand image.
struct NormOperandOp {
  Normalization of;
  BFloat16* out;
  const OperandMap* map;
};

// An operand image of `in`, rounded to bfloat16.
struct RoundOp {
  int64_t height, width;  // of in
  const float* in;
  int64_t in_stride, channels;
  BFloat16* out;
  const OperandMap* map;
  int64_t phase;  // 0; or elements from one of the four phases to the next (nhwc/operand.h)
  int64_t rest;   // 0; or elements to an image of the rounding remainders
};

constexpr int64_t kGroupNormChunk = 256;  // pixels per chunk of the statistics

// Floats of scratch that run_group_norm's team needs.
static constexpr int64_t group_norm_shared(int64_t n, int64_t pixels, int64_t channels) {
  return n * (divide_up(pixels, kGroupNormChunk) + 1) * 2 * channels;
}

// softmax(q k^T / sqrt(d)) v for every head; channels of qkv are [heads][q, k, v][d].
struct AttentionOp {
  int64_t tokens, heads, width;
  const float* qkv;
  int64_t qkv_stride;
  float* out;
  int64_t out_stride;
};

// The same by AMX, into positions `out_stride` elements apart.
struct TileAttentionOp {
  int64_t tokens, heads, width;
  const float* qkv;
  int64_t qkv_stride;
  BFloat16* out;
  int64_t out_stride;
};

// Floats of scratch that a thread of run_tile_attention needs.
static constexpr int64_t tile_attention_scratch(int64_t tokens, int64_t width) {
  const int64_t columns = round_up(tokens, 32), depth = round_up(width, 32);
  return (3 * columns + 16) * depth / 2 + 32 * (2 * (columns + 16) + depth);
}

static_assert(sizeof(ConvOp) <= 8 * (kOpWords - 2) && sizeof(WinogradOp) <= 8 * (kOpWords - 2), "");
static_assert(sizeof(GroupNormOp) <= 8 * (kOpWords - 2), "");
static_assert(sizeof(TileProductOp) <= 8 * (kOpWords - 2), "");

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
  int64_t scratch_floats;  // per thread
};

}  // namespace iddpm

IDDPM_DECLARE_AMX(int, run_norm_operand,
                  (const iddpm::NormOperandOp& op, const iddpm::PlanRun& run,
                   const iddpm::Team& team))
IDDPM_DECLARE_AMX(int, run_round, (const iddpm::RoundOp& op, const iddpm::Team& team))
IDDPM_DECLARE_AMX(int, run_tile_attention,
                  (const iddpm::TileAttentionOp& op, const iddpm::Team& team))

namespace iddpm {

namespace IDDPM_ISA {

// Each returns 0, or 1 if its scratch is too small.
int run_input(const InputOp& op, const PlanRun& run, const Team& team);
int run_output(const OutputOp& op, const PlanRun& run, const Team& team);
int run_group_norm(const GroupNormOp& op, const PlanRun& run, const Team& team);
int run_attention(const AttentionOp& op, const Team& team);

}  // namespace IDDPM_ISA
}  // namespace iddpm
