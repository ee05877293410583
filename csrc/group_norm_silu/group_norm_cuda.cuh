// What the CUDA kernels of the forward and of the backward pass share.
//
// A block owns whole groups of one sample, so nothing has to be exchanged between blocks and no
// result depends on the batch. Two ways to walk them:
//   rows     a team of threads per channel; vectors along the pixels (NCHW). With vectors of one
//            element it takes any strides.
//   columns  channels_last: a thread keeps its V channels and walks the pixels; a block takes a
//            slice of channels that is a multiple of both V and the group.
// Where the slice fits into shared memory it is read from global memory once (kStaged); the order
// of every sum is the same either way. Each thread stages what it alone reads again.
#pragma once

#include "common/cuda_compat.cuh"
#include "group_norm_silu/group_norm_silu.h"

namespace iddpm {

constexpr int kGroupNormThreads = 256;
// With the kernels' 16 KiB of their own, two blocks share a Hopper multiprocessor: one loads while
// the other stores.
constexpr int64_t kGroupNormStage = 96 << 10;
// Of which every kernel stays below this much.
constexpr int64_t kGroupNormStatic = 24 << 10;

template <typename T>
IDDPM_DEVICE T* element(const Plane& plane, int64_t n, int64_t channel, int64_t pixel) {
  return static_cast<T*>(plane.data) + n * plane.sample + channel * plane.channel +
         pixel * plane.pixel;
}

IDDPM_DEVICE float bias_of(const GroupNormInput& in, int64_t n, int64_t c) {
  return in.channel_bias && c < in.c1 ? in.channel_bias[n * in.channel_bias_stride + c] : 0.0f;
}

IDDPM_DEVICE float factor_of(const GroupNormInput& in, int64_t n, int64_t c) {
  return in.scale ? 1.0f + in.scale[n * in.scale_stride + c] : 1.0f;
}

// x + bias - mean = (x - centre) + rest, where the mean is of x + bias: `rest` is what rounding
// took from the centre, so that a mean of a thousand deviations costs no digits.
struct Centre {
  float centre, rest;
};

IDDPM_DEVICE Centre centre_of(float mean, float bias) {
  const float centre = mean - bias;
  return {centre, (centre - mean) + bias};
}

// z = (x - centre) * gain + offset, for a mean of mean + mean_rest.
struct AffineMap {
  float centre, gain, offset;
};

IDDPM_DEVICE AffineMap affine_map(const GroupNormInput& in, int64_t n, int64_t c, float mean,
                                  float mean_rest, float rstd, float bias) {
  const float factor = factor_of(in, n, c);
  const float shift = in.shift ? in.shift[n * in.shift_stride + c] : 0.0f;
  const Centre k = centre_of(mean, bias);
  const float gain = in.weight[c] * factor * rstd;
  return {k.centre, gain, in.bias[c] * factor + shift + gain * (k.rest - mean_rest)};
}

// How the threads of a block share the rows of its channels.
struct Teams {
  int size;   // threads of a team, a power of two
  int count;  // teams of the block
  int team, rank;
};

IDDPM_DEVICE Teams make_teams(int64_t vectors_per_row) {
  int size = 1;
  while (size < kGroupNormThreads && size < vectors_per_row) size *= 2;
  const int thread = static_cast<int>(threadIdx.x);
  return {size, kGroupNormThreads / size, thread / size, thread % size};
}

// Where a thread's vectors lie: `data` is the first, `step` leads from one to the next.
template <typename T>
struct Walk {
  T* data;
  int64_t step;

  IDDPM_DEVICE T* at(int64_t i) const { return data + i * step; }
};

// The pixels of channel c, from the first one on, `stride` pixels at a time; null where the plane
// is.
template <typename T>
IDDPM_DEVICE Walk<T> walk(const Plane& plane, int64_t n, int64_t c, int stride) {
  if (plane.data == nullptr) return {nullptr, 0};
  return {element<T>(plane, n, c, 0), stride * plane.pixel};
}

template <typename T>
IDDPM_DEVICE Walk<T> walk(const Plane& x, const Plane& x2, int64_t c1, int64_t n, int64_t c,
                          int stride) {
  return c < c1 ? walk<T>(x, n, c, stride) : walk<T>(x2, n, c - c1, stride);
}

// V elements that one thread keeps for itself, in shared memory or where they came from.
template <typename T, int V, bool kStaged>
struct Shelf {
  Pack<T, V>* slots;

  IDDPM_DEVICE void put(int64_t slot, const Pack<T, V>& pack) const {
    if constexpr (kStaged) slots[slot] = pack;
  }
  IDDPM_DEVICE Pack<T, V> get(int64_t slot, const T* origin) const {
    if constexpr (kAhead) return load_shared(slots + slot);
    if constexpr (kStaged) return slots[slot];
    return load_pack<T, V>(origin);
  }

  // Whether everything is fetched before the first of it is used: all loads are under way at once.
  static constexpr bool kAhead = kStaged && sizeof(Pack<T, V>) == 16;
  IDDPM_DEVICE void fetch(int64_t slot, const T* origin) const {
    if constexpr (kAhead) copy_async(slots + slot, origin);
  }
};

template <typename T, int V>
IDDPM_DEVICE void unpack(const Pack<T, V>& pack, float (&out)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = to_float(pack.v[i]);
}

template <typename T, int V>
IDDPM_DEVICE Pack<T, V> packed(const float (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.v[i] = from_float<T>(values[i]);
  return pack;
}

// a / b within 2 ulp for |b| < 2^126, and 0 above: without the slow path's call.
IDDPM_DEVICE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// 16-bit results cannot show the error of the approximate tanh.
template <typename T>
IDDPM_DEVICE float sigmoid_for(float z) {
  if constexpr (sizeof(T) == 4) return divide(1.0f, 1.0f + expf(-z));
  return 0.5f + 0.5f * tanh_approx(0.5f * z);
}

// ---- what the launchers decide

// Whether V neighbours move in one access from every place of the plane.
inline bool aligned(const Plane& plane, bool channels_last, int64_t v, int64_t bytes) {
  if (plane.data == nullptr) return true;
  const int64_t pitch = channels_last ? plane.pixel : plane.channel;
  const int64_t along = channels_last ? plane.channel : plane.pixel;
  return along == 1 && pitch % v == 0 && plane.sample % v == 0 &&
         reinterpret_cast<uintptr_t>(plane.data) % bytes == 0;
}

// Grants a kernel that much dynamic shared memory beside its own: more than 48 KiB in all must be
// asked for. False where the device has not that much.
template <typename Kernel>
bool grant_shared(Kernel kernel, int64_t bytes) {
  const int64_t all = bytes + kGroupNormStatic;
  if (all <= 48 << 10) return true;
  const auto code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(all));
  if (code != cudaSuccess) cudaGetLastError();
  return code == cudaSuccess;
}

}  // namespace iddpm
