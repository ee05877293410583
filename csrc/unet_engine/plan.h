// The plan of one network evaluation: a list of operations over NHWC float32 buffers.
//
// Python lays out the buffers and writes one row of 16 64-bit words an operation: its kind, then
// the kind's struct. Every thread of a team walks the list and takes its share of each operation. A
// buffer is a pointer and the distance between two pixels, so that a concatenation is two producers
// writing side by side.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "nhwc/conv.h"
#include "nhwc/gemm.h"
#include "nhwc/winograd.h"

namespace iddpm {

constexpr int64_t kOpWords = 16;

// One kind an algorithm. Python names them by the binding's RowKind, which lists them too.
enum class Kind : int64_t {
  kInput,
  kOutput,
  kGemm,
  kConv,
  kWinograd,
  kGroupNorm,
  kAttention,
  // GemmOp and WinogradOp (of tile 2) whose operands are rounded to bfloat16; w is then bfloat16,
  // [panels]...[C / 2][32][2], and everything else stays float32.
  kGemmBf16,
  kWinogradBf16,
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

// out = act(GroupNorm(x (+ e)) * weight + bias (then * (1 + scale) + shift)).
struct GroupNormOp {
  int64_t pixels;
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

constexpr int64_t kGroupNormChunk = 256;  // pixels whose statistics are taken together

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

static_assert(sizeof(ConvOp) <= 8 * (kOpWords - 1) && sizeof(WinogradOp) <= 8 * (kOpWords - 1), "");
static_assert(sizeof(GroupNormOp) <= 8 * (kOpWords - 1), "");

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

namespace IDDPM_ISA {

// Each returns 0, or 1 when the scratch is too small for it.
int run_input(const InputOp& op, const PlanRun& run, const Team& team);
int run_output(const OutputOp& op, const PlanRun& run, const Team& team);
int run_group_norm(const GroupNormOp& op, const PlanRun& run, const Team& team);
int run_attention(const AttentionOp& op, const Team& team);

}  // namespace IDDPM_ISA
}  // namespace iddpm
