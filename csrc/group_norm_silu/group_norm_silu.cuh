// The forward pass: which kernel is launched, and how.
#pragma once

#include "group_norm_silu/group_norm_silu_tiles.cuh"

namespace iddpm {

// Bytes of x in a block's tile: several blocks share a multiprocessor, so that some load while
// others store.
constexpr int64_t kForwardTile = 32 << 10;

template <typename T, int V, bool kSilu>
void launch_rows(const GroupNormSiluArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.in.n * a.in.groups)), block(kGroupNormThreads);
  const int64_t bytes = a.in.c / a.in.groups * a.in.hw * static_cast<int64_t>(sizeof(T));
  if (bytes <= kGroupNormStage && grant_shared(group_norm_rows_kernel<T, V, true, kSilu>, bytes))
    IDDPM_LAUNCH((group_norm_rows_kernel<T, V, true, kSilu>), grid, block, bytes, stream, a);
  else
    IDDPM_LAUNCH((group_norm_rows_kernel<T, V, false, kSilu>), grid, block, 0, stream, a);
}

template <typename T, int U>
bool launch_tiles(const GroupNormSiluArgs& a, void* stream) {
  constexpr int V = kPackSize<T>;
  const auto kernel = group_norm_tile_kernel<T, U>;
  const auto shared = [](const TilePlan& plan) { return ForwardTile::of(plan, U).end; };
  const TilePlan plan =
      plan_tiles<V>(a.in, sizeof(T), 1, kForwardTile, true, device_limits(kernel), shared);
  if (plan.width == 0) return false;
  const int64_t bytes = shared(plan);
  if (!grant_shared(kernel, bytes - kGroupNormStatic)) return false;
  const dim3 grid(static_cast<unsigned>(tile_blocks(a.in, plan)));
  const dim3 block(static_cast<unsigned>(plan.threads));
  if (plan.split) {
    IDDPM_LAUNCH((group_norm_tile_kernel<T, U>), grid, block, bytes, stream, a, plan,
                 TilePhase::kSums);
    IDDPM_LAUNCH((group_norm_tile_kernel<T, U>), grid, block, bytes, stream, a, plan,
                 TilePhase::kApply);
  } else if (plan.cluster) {
    IDDPM_LAUNCH_CLUSTER((group_norm_tile_kernel<T, U>), grid, static_cast<unsigned>(plan.chunks),
                         block, bytes, stream, a, plan, TilePhase::kResident);
  } else {
    IDDPM_LAUNCH((group_norm_tile_kernel<T, U>), grid, block, bytes, stream, a, plan,
                 TilePhase::kResident);
  }
  return true;
}

template <typename T>
bool launch_tiles(const GroupNormSiluArgs& a, void* stream) {
  constexpr int V = kPackSize<T>;
  const GroupNormInput& in = a.in;
  for (const Plane* plane : {&in.x, &in.x2, &a.residual, &a.sum, &a.y})
    if (!aligned(*plane, true, V, 16)) return false;
  if (in.c % V || in.c1 % V) return false;
  const int fragment = fragment_of(in, V);
  if (fragment == V) return launch_tiles<T, V>(a, stream);
  if (fragment == V / 2) return launch_tiles<T, V / 2>(a, stream);
  return launch_tiles<T, 1>(a, stream);
}

template <typename T, bool kSilu>
void launch_forward(const GroupNormSiluArgs& a, void* stream) {
  constexpr int V = kPackSize<T>;
  const GroupNormInput& in = a.in;
  if (in.channels_last && launch_tiles<T>(a, stream)) return;
  bool wide = !in.channels_last && in.hw % V == 0;
  for (const Plane* plane : {&in.x, &in.x2, &a.residual, &a.sum, &a.y})
    wide = wide && aligned(*plane, false, V, 16);
  if (wide) return launch_rows<T, V, kSilu>(a, stream);
  launch_rows<T, 1, kSilu>(a, stream);
}

}  // namespace iddpm
