// Included by every CUDA file of this project, and the only header it needs besides its own op's.
//
// A kernel is compiled twice: by nvcc, and by g++ against tests/cuda_emu/cuda_emu.h, which runs it
// on the CPU with real barriers, shuffles and shared memory. So, of a kernel file <op>.cuh and the
// launcher file <op>.cu beside it:
//
// - Launches are IDDPM_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...), never
//   <<< >>>; a template with several arguments needs parentheses:
//   IDDPM_LAUNCH((kernel<T, 8>), ...).
//
// - Static shared memory is IDDPM_SMEM(T, name, n), dynamic IDDPM_SMEM_DYNAMIC(T, name), never
//   __shared__. Both give a 16-byte aligned `T* const name`: sizeof(name) is that of a pointer.
//
// - Every thread of the block reaches each __syncthreads(), none having returned before, and every
//   lane of its mask each __shfl_*_sync: the emulator refuses anything else.
//
// - Inline PTX is within `#ifdef __CUDA_ARCH__`, with a plain fallback after `#else`.
//
// - Offsets are int64_t; 16 bytes are loaded and stored by load_pack and store_pack below.
//
// - Clusters are launched by IDDPM_LAUNCH_CLUSTER and used through cluster_rank and the functions
//   after it, if device_limits says that the device and the compiled code support them.
//
// - No cooperative groups, textures, device malloc or printf outside such a guard, and no atomics
// in
//   results that must be reproducible bit for bit.
//
// A launcher is `int <op>_cuda(const <Op>Args&, void* stream)`: it returns 0 for empty input before
// any launch, and launch_status() after it. Args are plain structs passed by value to the kernel.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/host_device.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define IDDPM_DEVICE __device__ __forceinline__
#define IDDPM_SMEM(T, name, n)                  \
  __shared__ __align__(16) T name##_storage[n]; \
  T* const name = name##_storage
#define IDDPM_SMEM_DYNAMIC(T, name)                           \
  extern __shared__ __align__(16) unsigned char iddpm_smem[]; \
  T* const name = reinterpret_cast<T*>(iddpm_smem)
#define IDDPM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// `cluster` blocks that follow each other along x form a cluster.
#define IDDPM_LAUNCH_CLUSTER(kernel, grid, cluster, block, shared_bytes, stream, ...) \
  iddpm::launch_cluster(kernel, grid, cluster, block, shared_bytes, stream, __VA_ARGS__)

#else

#include "cuda_emu.h"

#define IDDPM_DEVICE inline
#define IDDPM_SMEM(T, name, n) T* const name = cuda_emu::static_shared<T>(n, __FILE__, __LINE__)
#define IDDPM_SMEM_DYNAMIC(T, name) T* const name = cuda_emu::dynamic_shared<T>()
#define IDDPM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                        \
   cuda_emu::launch((grid), (block), (shared_bytes), [&] { kernel(__VA_ARGS__); }))
#define IDDPM_LAUNCH_CLUSTER(kernel, grid, cluster, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                                         \
   cuda_emu::launch((grid), (block), (shared_bytes), [&] { kernel(__VA_ARGS__); }, (cluster)))

#endif

namespace iddpm {

// The error code of the launches since the last call, 0 for none: what a launcher returns.
inline int launch_status() { return static_cast<int>(cudaGetLastError()); }

// ---- clusters: blocks that run at once and reach each other's shared memory (compute capability
// 9)

#if defined(__CUDACC__)
template <typename... Parameters, typename... Arguments>
void launch_cluster(void (*kernel)(Parameters...), dim3 grid, unsigned cluster, dim3 block,
                    size_t shared_bytes, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
#endif

// What a block can use on the current device: bytes of shared memory, and clusters, if the device
// and the compiled code support them. `kernel` is any kernel of that code; PTX of an older
// architecture does not. Queried once per device.
struct DeviceLimits {
  bool clusters;
  int64_t shared_bytes;
};

template <typename Kernel>
DeviceLimits device_limits([[maybe_unused]] Kernel kernel) {
#if defined(__CUDACC__)
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0, or twice the bytes and whether there are clusters
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return {false, 48 << 10};
  int code = known[device].load(std::memory_order_relaxed);
  if (code == 0) {
    int clusters = 0, bytes = 48 << 10;
    cudaFuncAttributes attributes{};
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
    cudaFuncGetAttributes(&attributes, kernel);
    code = 2 * bytes + (clusters && attributes.ptxVersion >= 90);
    known[device].store(code, std::memory_order_relaxed);
  }
  return {code % 2 != 0, code / 2};
#else
  return {true, static_cast<int64_t>(cuda_emu::kSharedOptInLimit)};
#endif
}

// The block's rank in its cluster.
IDDPM_DEVICE int cluster_rank() {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
#elif !defined(__CUDACC__)
  return cuda_emu::rank();
#else
  return 0;
#endif
}

// The two parts of the cluster's barrier, both called by every thread: after waiting, all threads
// see what any thread wrote before it arrived. A thread must pass one barrier before it stores into
// another block's shared memory, so that all blocks have started, and a block must not exit before
// a last barrier after such stores.
IDDPM_DEVICE void cluster_arrive() {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
#elif !defined(__CUDACC__)
  cuda_emu::arrive_at_cluster();
#endif
}

IDDPM_DEVICE void cluster_wait() {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
#elif !defined(__CUDACC__)
  cuda_emu_wait_for_cluster();
#endif
}

// Writes to the place of `mine` in the shared memory of the cluster's block `rank`.
IDDPM_DEVICE void cluster_store(float* mine, int rank, float value) {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 900
  const unsigned local = static_cast<unsigned>(__cvta_generic_to_shared(mine));
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#endif
#elif !defined(__CUDACC__)
  *cuda_emu::remote_shared(mine, rank) = value;
#endif
}

// ---- asynchronous copies of 16 bytes from global to shared memory, without registers

IDDPM_DEVICE void copy_async(void* shared, const void* global) {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 800
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
#elif !defined(__CUDACC__)
  cuda_emu::copy_async(shared, global);
#endif
}

// Waits for the calling thread's copies; other threads see them after a barrier.
IDDPM_DEVICE void copy_async_wait() {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
#elif !defined(__CUDACC__)
  cuda_emu::wait_for_copies();
#endif
}

// ---- 16-bit types: arithmetic is in float, rounding to nearest even on the way back

IDDPM_DEVICE float to_float(float x) { return x; }
IDDPM_DEVICE float to_float(__half x) { return __half2float(x); }
IDDPM_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
IDDPM_DEVICE T from_float(float x);
template <>
IDDPM_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
IDDPM_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
IDDPM_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---- vector memory access

// N adjacent elements of type T, for one load or store: N * sizeof(T) is 2, 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// How many T one 16-byte access holds.
template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

// For global memory; `p` is aligned to the size of the pack. In PTX, because nvcc splits a 16-byte
// C++ store into four of 4 bytes. These accesses are not reordered among themselves, so a kernel
// may work in place.
template <typename T, int N>
IDDPM_DEVICE Pack<T, N> load_pack(const T* p) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16,
                "a pack has 2, 4, 8 or 16 bytes");
#ifdef __CUDA_ARCH__
  if constexpr (kBytes == 16) {
    union {
      uint4 bits;
      Pack<T, N> pack;
    } u{};
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.bits.x), "=r"(u.bits.y), "=r"(u.bits.z), "=r"(u.bits.w)
                 : "l"(p));
    return u.pack;
  } else if constexpr (kBytes == 8) {
    union {
      uint2 bits;
      Pack<T, N> pack;
    } u{};
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(u.bits.x), "=r"(u.bits.y) : "l"(p));
    return u.pack;
  }
#elif !defined(__CUDACC__)
  cuda_emu::check_aligned(p, kBytes);
#endif
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <typename T, int N>
IDDPM_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16,
                "a pack has 2, 4, 8 or 16 bytes");
#ifdef __CUDA_ARCH__
  if constexpr (kBytes == 16) {
    union {
      Pack<T, N> pack;
      uint4 bits;
    } u{pack};
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(u.bits.x), "r"(u.bits.y),
                 "r"(u.bits.z), "r"(u.bits.w)
                 : "memory");
    return;
  } else if constexpr (kBytes == 8) {
    union {
      Pack<T, N> pack;
      uint2 bits;
    } u{pack};
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(u.bits.x), "r"(u.bits.y)
                 : "memory");
    return;
  }
#elif !defined(__CUDACC__)
  cuda_emu::check_aligned(p, kBytes);
#endif
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// 16 bytes of shared memory in one instruction; a copy of the struct would be split.
template <typename T, int N>
IDDPM_DEVICE Pack<T, N> load_shared(const Pack<T, N>* p) {
  static_assert(sizeof(Pack<T, N>) == 16, "a pack of 16 bytes");
#if defined(__CUDACC__)
  union {
    uint4 bits;
    Pack<T, N> pack;
  } u{*reinterpret_cast<const uint4*>(p)};
  return u.pack;
#else
  return *p;
#endif
}

template <typename T, int N>
IDDPM_DEVICE void store_shared(Pack<T, N>* p, const Pack<T, N>& pack) {
  static_assert(sizeof(Pack<T, N>) == 16, "a pack of 16 bytes");
#if defined(__CUDACC__)
  union {
    Pack<T, N> pack;
    uint4 bits;
  } u{pack};
  *reinterpret_cast<uint4*>(p) = u.bits;
#else
  *p = pack;
#endif
}

template <typename T, int N>
IDDPM_DEVICE void load_floats(const T* p, float (&out)[N]) {
  const Pack<T, N> pack = load_pack<T, N>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(pack.v[i]);
}

template <typename T, int N>
IDDPM_DEVICE void store_floats(T* p, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = from_float<T>(values[i]);
  store_pack<T, N>(p, pack);
}

// ---- reductions: a fixed tree, so the same numbers give the same bits, and every lane gets the
// result

IDDPM_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

IDDPM_DEVICE float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Sum over a one-dimensional block whose size is a multiple of 32, given to every thread. `scratch`
// is shared memory for 32 floats; it may be used again after the call without a barrier.
IDDPM_DEVICE float block_sum(float x, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? scratch[lane] : 0.0f);
  __syncthreads();
  return x;
}

// ---- functions with fast instructions

// tanh with a relative error of 2^-11: for results that are rounded to 16 bits.
IDDPM_DEVICE float tanh_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return tanhf(x);
#endif
}

}  // namespace iddpm
