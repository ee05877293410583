// The backward pass: which kernels are launched, and how.
#pragma once

#include "group_norm_silu/group_norm_silu_bwd_tiles.cuh"

namespace iddpm {

// Bytes of x, and as many of dy, in a block's tile.
constexpr int64_t kBackwardTile = 32 << 10;

template <typename T, int V, bool kSilu>
void launch_bwd_rows(const GroupNormSiluBwdArgs& a, void* stream) {
  const GroupNormInput& in = a.in;
  const dim3 grid(static_cast<unsigned>(in.n * in.groups)), block(kGroupNormThreads);
  const int64_t width = in.c / in.groups, pieces = kGroupNormThreads / 32;
  const int64_t sums = ((width * pieces * 3 + 3) / 4 * 4) * static_cast<int64_t>(sizeof(float));
  const int64_t bytes = sums + 2 * width * in.hw * static_cast<int64_t>(sizeof(T));
  if (bytes <= kGroupNormStage &&
      grant_shared(group_norm_bwd_rows_kernel<T, V, true, kSilu>, bytes))
    IDDPM_LAUNCH((group_norm_bwd_rows_kernel<T, V, true, kSilu>), grid, block, bytes, stream, a);
  else if (grant_shared(group_norm_bwd_rows_kernel<T, V, false, kSilu>, sums))
    IDDPM_LAUNCH((group_norm_bwd_rows_kernel<T, V, false, kSilu>), grid, block, sums, stream, a);
}

template <typename T, bool kSilu>
bool launch_bwd_tiles(const GroupNormSiluBwdArgs& a, void* stream) {
  constexpr int V = kPackSize<T>;
  for (const Plane* plane : {&a.in.x, &a.in.x2, &a.dy, &a.dsum, &a.dx, &a.dx2})
    if (!aligned(*plane, true, V, 16)) return false;
  if (a.in.c % V || a.in.c1 % V) return false;
  const auto kernel = group_norm_bwd_tile_kernel<T, kSilu>;
  const int tensors = a.dsum.data ? 3 : 2;
  const auto shared = [&](const TilePlan& plan) {
    return BackwardTile::of(plan, V, tensors).bytes(plan.width);
  };
  const TilePlan plan =
      plan_tiles<V>(a.in, sizeof(T), tensors, kBackwardTile, false, device_limits(kernel), shared);
  if (plan.width == 0) return false;
  const int64_t bytes = shared(plan);
  if (!grant_shared(kernel, bytes - kGroupNormStatic)) return false;
  const dim3 grid(static_cast<unsigned>(tile_blocks(a.in, plan)));
  const dim3 block(static_cast<unsigned>(plan.threads));
  if (plan.split) {
    IDDPM_LAUNCH((group_norm_bwd_tile_kernel<T, kSilu>), grid, block, bytes, stream, a, plan,
                 TilePhase::kSums);
    IDDPM_LAUNCH((group_norm_bwd_tile_kernel<T, kSilu>), grid, block, bytes, stream, a, plan,
                 TilePhase::kApply);
  } else if (plan.cluster) {
    IDDPM_LAUNCH_CLUSTER((group_norm_bwd_tile_kernel<T, kSilu>), grid,
                         static_cast<unsigned>(plan.chunks), block, bytes, stream, a, plan,
                         TilePhase::kResident);
  } else {
    IDDPM_LAUNCH((group_norm_bwd_tile_kernel<T, kSilu>), grid, block, bytes, stream, a, plan,
                 TilePhase::kResident);
  }
  return true;
}

template <typename T, bool kSilu>
void launch_backward(const GroupNormSiluBwdArgs& a, void* stream) {
  constexpr int V = kPackSize<T>;
  const GroupNormInput& in = a.in;
  bool wide = !in.channels_last && in.hw % V == 0;
  for (const Plane* plane : {&in.x, &in.x2, &a.dy, &a.dsum, &a.dx, &a.dx2})
    wide = wide && aligned(*plane, false, V, 16);
  if (!in.channels_last || !launch_bwd_tiles<T, kSilu>(a, stream))
    wide ? launch_bwd_rows<T, V, kSilu>(a, stream) : launch_bwd_rows<T, 1, kSilu>(a, stream);
  const dim3 grid(static_cast<unsigned>((in.c + kBatchChannels - 1) / kBatchChannels));
  IDDPM_LAUNCH(group_norm_bwd_batch_kernel, grid, dim3(kBatchChannels * kBatchLanes), 0, stream, a);
}

}  // namespace iddpm
