// Images of bfloat16 in which a tap of a convolution is a constant distance.
//
// The pixels of all samples form a sequence of positions, row after row, with zeros as padding: one
// column between rows and one row between samples. So any sixteen consecutive positions are a tile,
// whatever the width, and the tile for another tap is a constant distance away. Results at padding
// positions are not stored.
//
// For narrow images the padding column would waste too much of the tiles. They are stored as three
// copies, in which the position of a pixel holds its left neighbour, itself and its right
// neighbour, and padding rows only. The input of a convolution with stride 2 is split into four
// images (phases), of its even and odd rows and columns.
#pragma once

#include <cstdint>

#include <cstring>

#include "common/dtype.h"
#include "nhwc/team.h"

namespace iddpm {

constexpr int64_t kMostTaps = 27;

struct OperandMap {
  int64_t height, width;  // pixels of a sample
  int64_t row, sample;    // positions from row to row and from sample to sample
  int64_t pitch;          // elements from position to position
  int64_t copy;           // elements from one of the three copies to the next; 0: one copy
  int64_t out_pixel, out_row, out_sample;  // the product's output: strides in pixels
  int64_t taps, tap[kMostTaps];            // elements from a position to its tap
};

// The map of a 3 x 3 convolution with stride 1 and padding 1, in one copy; the engine's planner
// makes the others.
static inline OperandMap convolution_map(int64_t height, int64_t width, int64_t channels) {
  const int64_t row = width + 1, pitch = round_up(channels, 32);
  OperandMap map{height, width, row, (height + 1) * row, pitch, 0, 1, width, height * width, 9, {}};
  for (int64_t t = 0; t < 9; ++t) map.tap[t] = ((t / 3 - 1) * row + t % 3 - 1) * pitch;
  return map;
}

// Positions before the first pixel of such an image; and of the whole, including what the last tile
// reads beyond its end.
static inline int64_t positions_before(const OperandMap& map) { return map.row + 1; }
static inline int64_t positions_of(const OperandMap& map, int64_t n) {
  return positions_before(map) + n * map.sample + 32;
}

namespace IDDPM_ISA {

// Writes an operand image row by row, including the zeros around it. Rows are those of the map.
class OperandWriter {
 public:
  OperandWriter(const OperandMap& map, BFloat16* out, int64_t channels)
      : map_(map), out_(out), channels_(round_up(channels, 32)) {}

  // The address of a row's first pixel; pixels are `map.pitch` apart.
  BFloat16* row(int64_t sample, int64_t y) const {
    return out_ + (sample * map_.sample + y * map_.row) * map_.pitch;
  }

  // Called after the pixels of a row: writes the row's copies and the zeros around it.
  void finish(int64_t sample, int64_t y) const {
    if (map_.sample == map_.height * map_.row) return;  // no halo
    BFloat16* p = row(sample, y);
    if (map_.copy) {
      displace(p);
    } else {
      zero(p + map_.width * map_.pitch, 1);
    }
    for (int64_t c = 0; c < (map_.copy ? 3 : 1); ++c) {
      BFloat16* q = p + (map_.copy ? (c - 1) * map_.copy : 0);
      const int64_t above = map_.row + (map_.copy ? 0 : 1);
      if (sample == 0 && y == 0) zero(q - above * map_.pitch, above);
      if (y == map_.height - 1) zero(q + map_.row * map_.pitch, map_.row);
    }
  }

 private:
  void zero(BFloat16* p, int64_t positions) const {
    for (int64_t i = 0; i < positions; ++i)
      std::memset(p + i * map_.pitch, 0, size_t(channels_) * sizeof(BFloat16));
  }

  void displace(BFloat16* p) const {
    const int64_t pitch = map_.pitch;
    BFloat16* left = p - map_.copy;
    BFloat16* right = p + map_.copy;
    zero(left, 1);
    zero(right + (map_.width - 1) * pitch, 1);
    for (int64_t x = 0; x + 1 < map_.width; ++x) {
      std::memcpy(left + (x + 1) * pitch, p + x * pitch, size_t(channels_) * sizeof(BFloat16));
      std::memcpy(right + x * pitch, p + (x + 1) * pitch, size_t(channels_) * sizeof(BFloat16));
    }
  }

  const OperandMap& map_;
  BFloat16* out_;
  int64_t channels_;
};

}  // namespace IDDPM_ISA
}  // namespace iddpm
