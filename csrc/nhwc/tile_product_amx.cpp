// A block of two tiles of positions by two tiles of out-channels is accumulated in four tile
// registers over all taps and channels: four products for four loads.
#include "nhwc/amx_tile.h"
#include "nhwc/tile_product.h"

namespace iddpm {
namespace IDDPM_ISA {

namespace {

constexpr int64_t kWeightBytes = 768 * 1024;   // weights up to this size stay in the L2 cache
constexpr int64_t kOperandBytes = 768 * 1024;  // for larger ones, blocks of positions stay there

// The positions of all samples, divided into blocks of two tiles.
struct Positions {
  const OperandMap& map;
  int64_t samples, height, per_sample, tiles;  // tiles per sample
  Positions(const OperandMap& m, int64_t n) : map(m) {
    const bool flat = m.sample == m.height * m.row && m.out_sample == m.height * m.out_row;
    samples = flat ? 1 : n;
    height = flat ? n * m.height : m.height;
    per_sample = (height - 1) * m.row + m.width;
    tiles = divide_up(per_sample, kTileEdge);
  }
  int64_t count() const { return samples * tiles; }
};

// The 16 positions of a tile: the first one, and the output pixel of each, -1 for none.
struct TilePixels {
  int64_t begin;
  int64_t pixel[kTileEdge];
  bool whole;  // evenly spaced output pixels
};

TilePixels locate(const Positions& all, int64_t tile) {
  const OperandMap& map = all.map;
  const int64_t sample = tile / all.tiles, first = tile % all.tiles * kTileEdge;
  TilePixels t;
  t.begin = sample * map.sample + first;
  int64_t y = first / map.row, x = first % map.row;
  for (int64_t i = 0; i < kTileEdge; ++i) {
    const bool inside = x < map.width && y < all.height;
    t.pixel[i] =
        inside ? sample * map.out_sample + y * map.out_row + x * map.out_pixel : int64_t{-1};
    if (++x == map.row) {
      x = 0;
      ++y;
    }
  }
  const int64_t step = t.pixel[1] - t.pixel[0];
  t.whole = t.pixel[0] >= 0;
  for (int64_t i = 1; i < kTileEdge; ++i) t.whole = t.whole && t.pixel[i] == t.pixel[0] + i * step;
  return t;
}

// Tiles 0 to 3 += the products; only tiles 0 and 1 for one tile of positions.
template <int Rows>
IDDPM_INLINE void accumulate(const TileProductOp& op, const BFloat16* upper, const BFloat16* lower,
                             const BFloat16* w) {
  const OperandMap& map = *op.map;
  const int64_t stride = 2 * map.pitch;
  for (int64_t t = 0; t < map.taps; ++t) {
    const BFloat16* a = upper + map.tap[t];
    const BFloat16* b = lower + map.tap[t];
    for (int64_t c = 0; c < op.chunks; ++c, a += kTileDepth, b += kTileDepth) {
      tile_load<6>(w, 64);
      tile_load<4>(a, stride);
      tile_multiply<0, 4, 6>();
      tile_load<7>(w + kTileHalves, 64);
      tile_multiply<1, 4, 7>();
      if (Rows == 2) {
        tile_load<5>(b, stride);
        tile_multiply<2, 5, 6>();
        tile_multiply<3, 5, 7>();
      }
      w += 2 * kTileHalves;
    }
  }
}

IDDPM_INLINE void begin_sums(const float* bias) {
  if (bias) {  // with a stride of zero, so that every row is the bias
    tile_load<0>(bias, 0);
    tile_load<1>(bias + kTileEdge, 0);
    tile_load<2>(bias, 0);
    tile_load<3>(bias + kTileEdge, 0);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
}

// Stores two tiles (32 out-channels) to the output pixels of their rows.
template <int T>
IDDPM_INLINE void store_rows(const TileProductOp& op, const TilePixels& tile, int64_t column,
                             float* scratch) {
  const int64_t columns = smaller(kPanel, op.columns - column);
  if (tile.whole && !op.residual && !op.out_half && columns == kPanel) {
    float* out = op.out + tile.pixel[0] * op.out_stride + column;
    const int64_t stride = (tile.pixel[1] - tile.pixel[0]) * op.out_stride * int64_t{sizeof(float)};
    tile_store<T>(out, stride);
    tile_store<T + 1>(out + kTileEdge, stride);
    return;
  }
  tile_store<T>(scratch, kPanel * sizeof(float));
  tile_store<T + 1>(scratch + kTileEdge, kPanel * sizeof(float));
  if (tile.whole && op.residual && !op.out_half && columns == kPanel) {
    const int64_t step = tile.pixel[1] - tile.pixel[0];
    const float* residual = op.residual + tile.pixel[0] * op.residual_stride + column;
    float* out = op.out + tile.pixel[0] * op.out_stride + column;
    for (int64_t i = 0; i < kTileEdge; ++i) {
      IDDPM_UNROLL
      for (int64_t j = 0; j < kPanel; j += kWidth)
        store(out + j, load<nv>(scratch + i * kPanel + j) + load<nv>(residual + j));
      residual += step * op.residual_stride;
      out += step * op.out_stride;
    }
    return;
  }
  for (int64_t i = 0; i < kTileEdge; ++i) {
    if (tile.pixel[i] < 0) continue;
    if (op.out_half) {
      BFloat16* out = op.out_half + tile.pixel[i] * op.out_stride + column;
      const float* sums = scratch + i * kPanel;
      for (int64_t j = 0; j < columns; j += 2 * kWidth) {
        if (columns - j >= 2 * kWidth)
          store_both(out + j, load<nv>(sums + j), load<nv>(sums + j + kWidth));
        else
          store(out + j, load<nv>(sums + j));
      }
      continue;
    }
    float* out = op.out + tile.pixel[i] * op.out_stride + column;
    const float* residual =
        op.residual ? op.residual + tile.pixel[i] * op.residual_stride + column : nullptr;
    for (int64_t j = 0; j < columns; j += kWidth) {
      nv sum = load<nv>(scratch + i * kPanel + j);
      if (residual) sum += load<nv>(residual + j);
      store(out + j, sum);
    }
  }
}

void multiply(const TileProductOp& op, const Positions& all, Range blocks, Range panels) {
  alignas(64) float scratch[kTileEdge * kPanel];
  const int64_t panel_halves = op.map->taps * op.chunks * 2 * kTileHalves;
  const int64_t block_bytes = 2 * kTileEdge * 2 * op.map->pitch;
  const bool weights_stay = 2 * panel_halves * (panels.end - panels.begin) <= kWeightBytes;
  const int64_t together = weights_stay ? 1 : larger(kOperandBytes / block_bytes, 1);
  for (int64_t first = blocks.begin; first < blocks.end; first += together) {
    const int64_t last = smaller(first + together, blocks.end);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const BFloat16* w = op.w + panel * panel_halves;
      const int64_t column = panel * kPanel;
      for (int64_t block = first; block < last; ++block) {
        const bool two = 2 * block + 1 < all.count();
        const TilePixels upper = locate(all, 2 * block);
        const BFloat16* a = op.in + upper.begin * op.map->pitch;
        begin_sums(op.bias ? op.bias + column : nullptr);
        if (two) {
          const TilePixels lower = locate(all, 2 * block + 1);
          accumulate<2>(op, a, op.in + lower.begin * op.map->pitch, w);
          store_rows<2>(op, lower, column, scratch);
        } else {
          accumulate<1>(op, a, nullptr, w);
        }
        store_rows<0>(op, upper, column, scratch);
      }
    }
  }
}

}  // namespace

int run_tile_product(const TileProductOp& op, const Team& team) {
  const Tiles tiles;
  const Positions all(*op.map, team.n);
  const int64_t blocks = divide_up(all.count(), 2), panels = divide_up(op.columns, kPanel);
  if (blocks >= 2 * team.threads || panels < 2 * team.threads)
    multiply(op, all, share(blocks, 1, team.thread, team.threads), Range{0, panels});
  else
    multiply(op, all, Range{0, blocks}, share(panels, 1, team.thread, team.threads));
  return 0;
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
