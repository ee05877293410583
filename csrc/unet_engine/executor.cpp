#include "unet_engine/unet_engine.h"

namespace iddpm {
namespace IDDPM_ISA {

#if defined(__AVX2__)

namespace {

template <class T>
const T& as(const int64_t* words) {
  return *reinterpret_cast<const T*>(words);
}

int run_op(const int64_t* row, const PlanRun& run, const Team& team) {
  const int64_t* words = row + 1;
  switch (Kind(row[0])) {
    case Kind::kInput:
      return run_input(as<InputOp>(words), run, team);
    case Kind::kOutput:
      return run_output(as<OutputOp>(words), run, team);
    case Kind::kGemm:
      return run_gemm(as<GemmOp>(words), team);
    case Kind::kConv:
      return run_conv(as<ConvOp>(words), team);
    case Kind::kWinograd:
      return run_winograd(as<WinogradOp>(words), team);
    case Kind::kGroupNorm:
      return run_group_norm(as<GroupNormOp>(words), run, team);
    case Kind::kAttention:
      return run_attention(as<AttentionOp>(words), team);
#if defined(IDDPM_WITH_BF16) && defined(__AVX512F__)
    case Kind::kGemmBf16:
      return avx512_bf16::run_gemm_bf16(as<GemmOp>(words), team);
    case Kind::kWinogradBf16:
      return avx512_bf16::run_winograd_bf16(as<WinogradOp>(words), team);
#endif
    case Kind::kTileProduct:
      if (const auto kernel = IDDPM_AMX(run_tile_product))
        return kernel(as<TileProductOp>(words), team);
      break;
    case Kind::kNormOperand:
      if (const auto kernel = IDDPM_AMX(run_norm_operand))
        return kernel(as<NormOperandOp>(words), run, team);
      break;
    case Kind::kRound:
      if (const auto kernel = IDDPM_AMX(run_round)) return kernel(as<RoundOp>(words), team);
      break;
    case Kind::kTileAttention:
      if (const auto kernel = IDDPM_AMX(run_tile_attention))
        return kernel(as<TileAttentionOp>(words), team);
      break;
    default:
      break;
  }
  return 1;
}

// All threads have the same sizes, so either all stop at an operation or none does.
int64_t walk(const PlanRun& run, int64_t thread, int64_t threads) {
  Team team{thread,
            threads,
            run.n,
            run.shared,
            run.shared_floats,
            run.scratch + thread * run.scratch_floats,
            run.scratch_floats};
  PlanRun part = run;
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t* row = run.ops + i * kOpWords;
    const int64_t first = row[kOpWords - 1] >> 32, count = row[kOpWords - 1] & 0xffffffff;
    team.n = smaller(count ? count : run.n, run.n - first);
    if (team.n <= 0) continue;
    part.embedding_row = run.embedding_row + first;
    if (run_op(row, part, team)) return i + 1;
    barrier(team);
  }
  return 0;
}

}  // namespace

int64_t unet_engine(const PlanRun& run) {
  int64_t failed = 0;
  for_threads(run.threads, false, [&](int64_t thread, int64_t threads) {
    const int64_t code = walk(run, thread, threads);
    if (thread == 0) failed = code;
  });
  return failed;
}

#else

int64_t unet_engine(const PlanRun&) { return -1; }

#endif

}  // namespace IDDPM_ISA
}  // namespace iddpm
