// The tile instructions of AMX: eight registers of 16 rows of 64 bytes, and products of bfloat16.
//
// Natively one instruction each; in the emulation the same semantics in plain C++, including the
// configuration of each thread. Where the CPU would raise an exception, for an instruction without
// a configuration or on tiles whose sizes do not match, the emulation stores NaN.
//
// c [16, 16] += a [16, 32] b [32, 16]: rows of `a` are 32 bfloat16; `b` holds pairs of rows,
// [16][16][2], in the order in which pairs of columns of `a` use them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/lanes.h"
#include "common/sizes.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr int64_t kTileEdge = 16;         // rows, and float32 columns
constexpr int64_t kTileDepth = 32;        // bfloat16 columns
constexpr int64_t kTileHalves = 16 * 32;  // bfloat16 values of a tile
constexpr int64_t kTileBytes = 2 * kTileHalves;

struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Eight whole tiles.
IDDPM_INLINE TileConfiguration whole_tiles() {
  TileConfiguration c{};
  c.palette = 1;
  for (int i = 0; i < 8; ++i) {
    c.row_bytes[i] = 64;
    c.rows[i] = 16;
  }
  return c;
}

#if defined(__AMX_BF16__)

IDDPM_INLINE void tile_configure(const TileConfiguration& c) {
  asm volatile("ldtilecfg %0" ::"m"(c));
}
IDDPM_INLINE void tile_release() { asm volatile("tilerelease"); }

template <int T>
IDDPM_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// Rows are `stride` bytes apart.
template <int T>
IDDPM_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

template <int T>
IDDPM_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

template <int C, int A, int B>
IDDPM_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct EmulatedTiles {
  TileConfiguration configuration;
  alignas(64) unsigned char data[8][16][64];
};

inline thread_local EmulatedTiles emulated_tiles;

inline void tile_configure(const TileConfiguration& c) {
  std::memset(&emulated_tiles, 0, sizeof emulated_tiles);
  emulated_tiles.configuration = c;
}
inline void tile_release() { emulated_tiles.configuration = TileConfiguration{}; }

inline bool configured(int t) {
  const TileConfiguration& c = emulated_tiles.configuration;
  return c.palette == 1 && c.rows[t] > 0 && c.row_bytes[t] > 0;
}

template <int T>
void tile_zero() {
  if (configured(T)) std::memset(emulated_tiles.data[T], 0, sizeof emulated_tiles.data[T]);
}

template <int T>
void tile_load(const void* p, int64_t stride) {
  if (!configured(T)) return;
  const TileConfiguration& c = emulated_tiles.configuration;
  std::memset(emulated_tiles.data[T], 0, sizeof emulated_tiles.data[T]);
  for (int row = 0; row < c.rows[T]; ++row)
    std::memcpy(emulated_tiles.data[T][row], static_cast<const char*>(p) + row * stride,
                c.row_bytes[T]);
}

template <int T>
void tile_store(void* p, int64_t stride) {
  if (!configured(T)) {
    for (int row = 0; row < 16; ++row) std::memset(static_cast<char*>(p) + row * stride, 0xFF, 64);
    return;
  }
  const TileConfiguration& c = emulated_tiles.configuration;
  for (int row = 0; row < c.rows[T]; ++row)
    std::memcpy(static_cast<char*>(p) + row * stride, emulated_tiles.data[T][row], c.row_bytes[T]);
}

// Sums even and odd products separately, like the instruction.
template <int C, int A, int B>
void tile_multiply() {
  if (!configured(C) || !configured(A) || !configured(B)) return;
  const TileConfiguration& t = emulated_tiles.configuration;
  const int pairs = t.row_bytes[A] / 4, columns = t.row_bytes[C] / 4;
  if (t.rows[A] != t.rows[C] || t.rows[B] != pairs || t.row_bytes[B] != t.row_bytes[C]) {
    std::memset(emulated_tiles.data[C], 0xFF, sizeof emulated_tiles.data[C]);
    return;
  }
  for (int row = 0; row < t.rows[C]; ++row) {
    float even[16] = {}, odd[16] = {}, sum[16];
    for (int k = 0; k < pairs; ++k) {
      uint32_t a, b[16];
      std::memcpy(&a, emulated_tiles.data[A][row] + 4 * k, 4);
      std::memcpy(b, emulated_tiles.data[B][k], 64);
      const uint32_t a_even = a << 16, a_odd = a & 0xffff0000u;
      float even_value, odd_value;
      std::memcpy(&even_value, &a_even, 4);
      std::memcpy(&odd_value, &a_odd, 4);
      for (int j = 0; j < columns; ++j) {
        const uint32_t b_even = b[j] << 16, b_odd = b[j] & 0xffff0000u;
        float x, y;
        std::memcpy(&x, &b_even, 4);
        std::memcpy(&y, &b_odd, 4);
        even[j] += even_value * x;
        odd[j] += odd_value * y;
      }
    }
    std::memcpy(sum, emulated_tiles.data[C][row], 64);
    for (int j = 0; j < columns; ++j) sum[j] += even[j] + odd[j];
    std::memcpy(emulated_tiles.data[C][row], sum, size_t(4 * columns));
  }
}

#endif

// Stores two vectors one after the other.
IDDPM_INLINE void store_both(BFloat16* p, nv first, nv second) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_maskz_cvtne2ps_pbh(~0u, (__m512)second, (__m512)first);
  std::memcpy(p, &both, sizeof both);
#else
  store(p, first);
  store(p + kWidth, second);
#endif
}

// Interleaves two rows for the second operand: out[2 j] from `even`, out[2 j + 1] from `odd`.
IDDPM_INLINE void store_pairs(BFloat16* out, vf even, vf odd) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_maskz_cvtne2ps_pbh(~0u, (__m512)odd, (__m512)even);
  const __m512i evens = _mm512_maskz_cvtepu16_epi32(kAllLanes, _mm512_castsi512_si256(both));
  const __m512i odds =
      _mm512_maskz_cvtepu16_epi32(kAllLanes, _mm512_maskz_extracti64x4_epi64(0xF, both, 1));
  _mm512_storeu_si512(out, _mm512_or_si512(evens, _mm512_maskz_slli_epi32(kAllLanes, odds, 16)));
#else
  BFloat16 row[2][kLanes];
  store(row[0], even);
  store(row[1], odd);
  Halves<vf> half[2];
  std::memcpy(half, row, sizeof half);
  const vu pairs = __builtin_convertvector(half[0], vu) | __builtin_convertvector(half[1], vu)
                                                              << 16;
  std::memcpy(out, &pairs, sizeof pairs);
#endif
}

// Rows of 16 pairs, `pitch` elements apart -> [16 pairs][16 rows].
IDDPM_INLINE void transpose_pairs(const BFloat16* rows, int64_t pitch, BFloat16* out) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  IDDPM_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * pitch);
  IDDPM_UNROLL
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_maskz_unpacklo_epi32(0xFFFF, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_epi32(0xFFFF, a[i], a[i + 1]);
  }
  IDDPM_UNROLL
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: column j of every four, of rows i to i + 3
    a[i] = _mm512_maskz_unpacklo_epi64(0xFF, b[i], b[i + 2]);
    a[i + 1] = _mm512_maskz_unpackhi_epi64(0xFF, b[i], b[i + 2]);
    a[i + 2] = _mm512_maskz_unpacklo_epi64(0xFF, b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_maskz_unpackhi_epi64(0xFF, b[i + 1], b[i + 3]);
  }
  IDDPM_UNROLL
  for (int j = 0; j < 4; ++j) {  // columns j and 8 + j, 4 + j and 12 + j
    const __m512i first = _mm512_maskz_shuffle_i32x4(0xFFFF, a[j], a[4 + j], 0x88);
    const __m512i second = _mm512_maskz_shuffle_i32x4(0xFFFF, a[8 + j], a[12 + j], 0x88);
    const __m512i third = _mm512_maskz_shuffle_i32x4(0xFFFF, a[j], a[4 + j], 0xDD);
    const __m512i fourth = _mm512_maskz_shuffle_i32x4(0xFFFF, a[8 + j], a[12 + j], 0xDD);
    b[j] = _mm512_maskz_shuffle_i32x4(0xFFFF, first, second, 0x88);
    b[8 + j] = _mm512_maskz_shuffle_i32x4(0xFFFF, first, second, 0xDD);
    b[4 + j] = _mm512_maskz_shuffle_i32x4(0xFFFF, third, fourth, 0x88);
    b[12 + j] = _mm512_maskz_shuffle_i32x4(0xFFFF, third, fourth, 0xDD);
  }
  IDDPM_UNROLL
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * kTileDepth, b[i]);
#else
  for (int64_t row = 0; row < kTileEdge; ++row)
    for (int64_t pair = 0; pair < kTileEdge; ++pair)
      std::memcpy(out + (pair * kTileEdge + row) * 2, rows + row * pitch + 2 * pair, 4);
#endif
}

// Configures a thread's tiles for the duration of a kernel, whatever other libraries left behind,
// and releases them at its end, because tiles in use slow down context switches.
class Tiles {
 public:
  Tiles() { tile_configure(whole_tiles()); }
  ~Tiles() { tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace IDDPM_ISA
}  // namespace iddpm
