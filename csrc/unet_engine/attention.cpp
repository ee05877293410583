// Attention over NHWC rows: the operator's kernel on the plan's buffers.
#if defined(__AVX2__)
#include "qkv_attention/attention_cpu.h"
#include "unet_engine/plan.h"

namespace iddpm {
namespace IDDPM_ISA {

int run_attention(const AttentionOp& op, const Team& team) {
  const int64_t tokens = op.tokens, d = op.width;
  if (attention_workspace(tokens, d) > team.scratch_floats) return 1;
  QkvAttentionArgs args{};
  args.in = {team.n, tokens, op.heads, d, 3 * d, d, DType::kFloat32, {}, nullptr};
  args.in.qkv = {const_cast<float*>(op.qkv), tokens * op.qkv_stride, 1, op.qkv_stride};
  args.out = {op.out, tokens * op.out_stride, 1, op.out_stride};
  attend_share<float>(args, team.thread, team.threads, team.scratch);
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
#endif
