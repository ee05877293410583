#include "q_sample/q_sample.h"

#include "common/columns.h"
#include "common/noise_tile.h"
#include "common/threads.h"

namespace iddpm {
namespace IDDPM_ISA {

void q_sample(const QSampleArgs& a, int num_threads) {
  const int64_t all = a.c * a.hw;
  const int64_t chunks = divide_up(all, kChunk);
  for_jobs(a.n * chunks, num_threads, a.n * all < kSerialBelow, [&](int64_t job) {
    const int64_t sample = job / chunks, start = (job % chunks) * kChunk;
    const int64_t end = start + kChunk < all ? start + kChunk : all;
    const float* row = table_row(a.table, a.t[sample], a.num_timesteps);
    const vf signal = splat(row[kSqrtAlphaBar]), deviation = splat(row[kSqrtOneMinusAlphaBar]);
    for (int64_t first = start; first < end; first += kTile) {
      const int64_t count = end - first < kTile ? end - first : kTile;
      float x_space[kTile], z_space[kTile], result_space[kTile];
      const float* x = read_tile(a.x_0, DType::kFloat32, a.hw, sample, first, count, x_space);
      const float* z = noise_tile(a.noise, a.key, a.hw, sample, first, count, z_space);
      float* result = write_target(a.x_t, a.hw, sample, first, count, result_space);
      for (int64_t i = 0; i < kTile; i += kLanes)
        store(result + i, signal * load(x + i) + deviation * load(z + i));
      write_back(a.x_t, a.hw, sample, first, count, result, result_space);
    }
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
