// Runs CUDA kernels on the CPU: every thread of a block is a fiber, and barriers, shuffles and
// shared memory behave as on a device. It finds a missing or divergent barrier, a shuffle that a
// lane misses, unset shared memory (filled with NaN), an overrun of it (a canary, or
// AddressSanitizer), a misaligned vector access and launches beyond the limits.
//
// One cluster of blocks runs at a time, where there are none one block. Each warp runs alone until
// all its lanes wait, and the warps take turns in an order drawn from CUDA_EMU_SEED, so that a
// forgotten barrier changes the result. An asynchronous copy arrives when it is waited for, and no
// earlier. A store into another block's shared memory must follow a barrier of the cluster, and
// that block must live. What it cannot find: races inside a warp, races between clusters, effects
// of weakly ordered memory.
#pragma once

#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emu_fiber.h"
#include "cuda_emu_types.h"

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_emu {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxCluster = 8;

// A size that a launcher decides, or what a test has put into CUDA_EMU_<name>.
inline int64_t setting(const char* name, int64_t value) {
  const char* other = getenv((std::string("CUDA_EMU_") + name).c_str());
  return other && *other ? atoll(other) : value;
}

constexpr size_t kSharedLimit = 48 << 10, kSharedOptInLimit = 227 << 10, kCanaryBytes = 64;
constexpr unsigned char kUnset = 0xFF, kCanary = 0xA5;  // 0xFF... is a NaN in every float type

enum State { kReady, kAtBarrier, kAtWarp, kAtCluster, kDone };

struct AsyncCopy {
  void* target;
  const void* source;
};

struct Thread {
  Fiber fiber;
  State state;
  const char* file;  // where it waits
  int line;
  uint32_t mask;        // of the warp operation it waits at
  uint64_t value;       // what it brought to it
  int arrivals, waits;  // at the cluster's barrier
  std::vector<AsyncCopy> copies;
};

struct SharedArray {
  const char* file;
  int line;
  size_t bytes;
  unsigned char* data;
};

struct Engine {
  Thread threads[kMaxCluster * kMaxThreads];      // those of a block stand together
  uint64_t exchanged[kMaxCluster * kMaxThreads];  // the values of the last completed warp operation
  Fiber scheduler;
  std::function<void()> body;
  std::vector<SharedArray> shared[kMaxCluster];
  size_t dynamic_bytes = 0, shared_limit = kSharedLimit;
  int threads_in_block = 0, cluster = 1, current = 0, error_code = 0;
  uint64_t first_block = 0;  // of the cluster
  uint64_t random = 0;
  bool failed = false;
  std::string message;
};
inline Engine engine;

inline uint32_t random_below(uint32_t n) {
  engine.random = engine.random * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>((engine.random >> 33) % n);
}

inline void report(int code, const std::string& message) {
  if (engine.failed) return;
  engine.failed = true;
  engine.error_code = code;
  engine.message = message;
}

inline std::string site(const char* file, int line) {
  const char* slash = strrchr(file, '/');
  return (slash ? slash + 1 : file) + (line ? ":" + std::to_string(line) : "");
}

inline std::string name(int thread) {
  const Thread& t = engine.threads[thread];
  const std::string who = "thread " + std::to_string(thread % engine.threads_in_block);
  if (t.state == kDone) return who + " has returned";
  return who + " waits at " + site(t.file, t.line);
}

// The rank of the running thread's block in its cluster, and the thread's number in the block.
inline int rank() { return engine.current / engine.threads_in_block; }
inline int thread_in_block() { return engine.current % engine.threads_in_block; }

// ---- in a thread

inline void wait(State state, const char* file, int line) {
  Thread& t = engine.threads[engine.current];
  t.state = state;
  t.file = file;
  t.line = line;
  switch_fiber(t.fiber, engine.scheduler, state == kDone);
}

// Gives up the launch: this thread never continues.
[[noreturn]] inline void fail(const std::string& message) {
  report(719, message + " (thread " + std::to_string(thread_in_block()) + ", block " +
                  std::to_string(blockIdx.x) + ")");
  wait(kDone, "", 0);
  abort();
}

inline void check_aligned(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("misaligned access of " + std::to_string(bytes) + " bytes");
}

inline void thread_main() {
  enter_fiber(engine.scheduler);
  engine.body();
  wait(kDone, "", 0);
  abort();
}

inline unsigned char* new_shared(size_t bytes, const char* file, int line) {
  size_t total = bytes;
  std::vector<SharedArray>& shared = engine.shared[rank()];
  for (const SharedArray& a : shared) total += a.bytes;
  if (total > engine.shared_limit)
    fail(std::to_string(total) + " bytes of shared memory, the limit is " +
         std::to_string(engine.shared_limit));
  // Under AddressSanitizer its own red zone follows the array, without it ours.
  const size_t guard = kAddressSanitizer ? 0 : kCanaryBytes;
  void* data = nullptr;
  if (posix_memalign(&data, 16, bytes + guard + (bytes + guard == 0))) abort();
  memset(data, kUnset, bytes);
  memset(static_cast<unsigned char*>(data) + bytes, kCanary, guard);
  shared.push_back({file, line, bytes, static_cast<unsigned char*>(data)});
  return shared.back().data;
}

template <typename T>
T* static_shared(size_t n, const char* file, int line) {
  for (const SharedArray& a : engine.shared[rank()])
    if (a.line == line && a.bytes == n * sizeof(T) && strcmp(a.file, file) == 0)
      return reinterpret_cast<T*>(a.data);
  return reinterpret_cast<T*>(new_shared(n * sizeof(T), file, line));
}

template <typename T>
T* dynamic_shared() {
  for (const SharedArray& a : engine.shared[rank()])
    if (a.line == 0) return reinterpret_cast<T*>(a.data);
  return reinterpret_cast<T*>(new_shared(engine.dynamic_bytes, "dynamic shared memory", 0));
}

// Where `mine`, in the running block's shared memory, lies in that of another block of the cluster.
template <typename T>
T* remote_shared(T* mine, int other) {
  if (other < 0 || other >= engine.cluster)
    fail("no block " + std::to_string(other) + " in the cluster");
  if (other == rank()) return mine;
  const int first = other * engine.threads_in_block;
  bool lives = false;
  for (int i = 0; i < engine.threads_in_block; ++i) {
    lives = lives || engine.threads[first + i].state != kDone;
    if (engine.threads[first + i].arrivals == 0)
      fail("access to a block of the cluster that may not have started");
  }
  if (!lives) fail("access to a block of the cluster that has returned");
  const auto address = reinterpret_cast<unsigned char*>(mine);
  const std::vector<SharedArray>& here = engine.shared[rank()];
  for (const SharedArray& a : here) {
    if (address < a.data || address >= a.data + a.bytes) continue;
    for (const SharedArray& b : engine.shared[other])
      if (b.line == a.line && b.bytes == a.bytes && strcmp(b.file, a.file) == 0)
        return reinterpret_cast<T*>(b.data + (address - a.data));
  }
  fail("an address outside shared memory is given for another block's");
}

// One arrival to each wait, in turn; whoever has returned keeps nobody waiting.
inline void arrive_at_cluster() {
  Thread& t = engine.threads[engine.current];
  if (t.arrivals != t.waits) fail("a second arrival at the cluster's barrier without a wait");
  ++t.arrivals;
}

inline void wait_for_cluster(const char* file, int line) {
  Thread& t = engine.threads[engine.current];
  if (t.arrivals != ++t.waits) fail("a wait at the cluster's barrier without an arrival");
  wait(kAtCluster, file, line);
}

inline void copy_async(void* target, const void* source) {
  check_aligned(target, 16);
  check_aligned(source, 16);
  engine.threads[engine.current].copies.push_back({target, source});
}

inline void wait_for_copies() {
  std::vector<AsyncCopy>& copies = engine.threads[engine.current].copies;
  for (const AsyncCopy& copy : copies) memcpy(copy.target, copy.source, 16);
  copies.clear();
}

template <typename T>
T exchange(uint32_t mask, T value, int source_lane, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  Thread& t = engine.threads[engine.current];
  const int lane = thread_in_block() % kWarp, first = engine.current - lane;
  if (!(mask >> lane & 1))
    fail("the mask at " + site(file, line) + " lacks the lane that calls it");
  t.mask = mask;
  t.value = 0;
  memcpy(&t.value, &value, sizeof(T));
  wait(kAtWarp, file, line);
  T result;
  memset(&result, kUnset, sizeof(T));
  if (mask >> source_lane & 1) memcpy(&result, &engine.exchanged[first + source_lane], sizeof(T));
  return result;
}

inline uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line) {
  exchange<int>(mask, predicate, 0, file, line);
  const int first = engine.current - thread_in_block() % kWarp;
  uint32_t bits = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) bits |= uint32_t(engine.exchanged[first + lane] != 0) << lane;
  return bits;
}

// ---- in the scheduler

inline void resume(int thread) {
  engine.current = thread;
  const uint64_t block = engine.first_block + rank();
  blockIdx = dim3(block % gridDim.x, block / gridDim.x % gridDim.y,
                  block / (uint64_t(gridDim.x) * gridDim.y));
  const int local = thread_in_block();
  threadIdx.x = local % blockDim.x;
  threadIdx.y = local / blockDim.x % blockDim.y;
  threadIdx.z = local / (blockDim.x * blockDim.y);
  switch_fiber(engine.scheduler, engine.threads[thread].fiber, false);
}

// Completes the warp operations that all lanes of their mask have reached; false if none waits.
inline bool complete_warp_operations(int first, int lanes) {
  bool completed = false;
  for (int lane = 0; lane < lanes; ++lane) {
    const Thread& t = engine.threads[first + lane];
    if (t.state != kAtWarp) continue;
    const uint32_t mask = t.mask & (lanes == kWarp ? ~0u : (1u << lanes) - 1);
    for (int other = 0; other < lanes; ++other) {
      const Thread& o = engine.threads[first + other];
      if (!(mask >> other & 1)) continue;
      if (o.state != kAtWarp || o.line != t.line || strcmp(o.file, t.file) || o.mask != t.mask) {
        report(719,
               "divergent warp operation: " + name(first + lane) + ", but " + name(first + other));
        return false;
      }
    }
    for (int other = 0; other < lanes; ++other) {
      if (!(mask >> other & 1)) continue;
      Thread& o = engine.threads[first + other];
      engine.exchanged[first + other] = o.value;
      o.state = kReady;
    }
    completed = true;
  }
  return completed;
}

inline void run_warp(int first, int lanes) {
  const int flip = static_cast<int>(random_below(kWarp));
  do {
    for (int i = 0; i < kWarp; ++i) {
      const int lane = i ^ flip;
      if (lane < lanes && engine.threads[first + lane].state == kReady) resume(first + lane);
      if (engine.failed) return;
    }
  } while (complete_warp_operations(first, lanes));
}

// Releases the barrier of a block; false when none of its threads waits there, or it is divergent.
inline bool release_barrier(int rank) {
  const int n = engine.threads_in_block, first = rank * n;
  int waiting = -1;
  for (int i = first; i < first + n && waiting < 0; ++i)
    if (engine.threads[i].state == kAtBarrier) waiting = i;
  if (waiting < 0) return false;
  const Thread& w = engine.threads[waiting];
  for (int i = first; i < first + n; ++i) {
    const Thread& t = engine.threads[i];
    if (t.state != kAtBarrier || t.line != w.line || strcmp(t.file, w.file)) {
      report(719, "divergent __syncthreads: " + name(waiting) + ", but " + name(i));
      return false;
    }
  }
  for (int i = first; i < first + n; ++i) engine.threads[i].state = kReady;
  return true;
}

// Lets those go on who wait at the cluster's barrier for arrivals that have all happened; false if
// nobody waits there.
inline bool release_cluster_barrier() {
  const int n = engine.threads_in_block * engine.cluster;
  int least = INT_MAX;
  for (int i = 0; i < n; ++i)
    if (engine.threads[i].state != kDone) least = std::min(least, engine.threads[i].arrivals);
  bool released = false;
  for (int i = 0; i < n; ++i) {
    if (engine.threads[i].state != kAtCluster || engine.threads[i].arrivals > least) continue;
    engine.threads[i].state = kReady;
    released = true;
  }
  return released;
}

inline void free_shared(std::vector<SharedArray>& shared) {
  for (const SharedArray& a : shared) {
    for (size_t i = 0; !kAddressSanitizer && i < kCanaryBytes; ++i)
      if (a.data[a.bytes + i] != kCanary)
        report(719, "shared memory overrun behind the " + std::to_string(a.bytes) + " bytes of " +
                        site(a.file, a.line));
    free(a.data);
  }
  shared.clear();
}

inline void run_cluster() {
  const int n = engine.threads_in_block, warps = (n + kWarp - 1) / kWarp;
  for (int i = 0; i < n * engine.cluster; ++i) {
    start_fiber(engine.threads[i].fiber, thread_main);
    engine.threads[i].state = kReady;
    engine.threads[i].arrivals = engine.threads[i].waits = 0;
    engine.threads[i].copies.clear();
  }
  std::vector<int> order(warps * engine.cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  bool released = true;
  while (released && !engine.failed) {
    for (size_t i = order.size() - 1; i > 0; --i)
      std::swap(order[i], order[random_below(static_cast<uint32_t>(i + 1))]);
    for (size_t i = 0; i < order.size() && !engine.failed; ++i) {
      const int first = order[i] % warps * kWarp;
      run_warp(order[i] / warps * n + first, n - first < kWarp ? n - first : kWarp);
    }
    released = false;
    for (int rank = 0; rank < engine.cluster && !engine.failed; ++rank)
      released = release_barrier(rank) || released;
    if (!released && !engine.failed) released = release_cluster_barrier();
  }
  for (int rank = 0; rank < engine.cluster; ++rank) free_shared(engine.shared[rank]);
}

inline void launch(dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> body,
                   unsigned cluster = 1) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (engine.error_code) return;
  engine.failed = false;
  engine.message.clear();
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535 || dynamic_bytes > engine.shared_limit ||
      cluster == 0 || cluster > kMaxCluster || grid.x % cluster) {
    report(9, "invalid launch: grid " + std::to_string(grid.x) + "x" + std::to_string(grid.y) +
                  "x" + std::to_string(grid.z) + ", " + std::to_string(threads) + " threads, " +
                  std::to_string(dynamic_bytes) + " bytes of shared memory, clusters of " +
                  std::to_string(cluster));
    return;
  }
  const char* seed = getenv("CUDA_EMU_SEED");
  engine.random = seed ? strtoull(seed, nullptr, 10) : 0;
  engine.body = std::move(body);
  engine.dynamic_bytes = dynamic_bytes;
  engine.threads_in_block = static_cast<int>(threads);
  gridDim = grid;
  blockDim = block;
  engine.cluster = static_cast<int>(cluster);
  const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / cluster;
  const bool backwards = random_below(2);
  for (uint64_t i = 0; i < clusters && !engine.failed; ++i) {
    engine.first_block = (backwards ? clusters - 1 - i : i) * cluster;
    run_cluster();
  }
}

}  // namespace cuda_emu

// ---- CUDA's names

#define CUDA_EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_EMU_SITE) { cuda_emu::wait(cuda_emu::kAtBarrier, file, line); }
inline void __syncwarp(uint32_t mask = ~0u, CUDA_EMU_SITE) {
  cuda_emu::exchange<int>(mask, 0, 0, file, line);
}
inline void cuda_emu_wait_for_cluster(CUDA_EMU_SITE) { cuda_emu::wait_for_cluster(file, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(uint32_t mask, T x, int source, int width = 32, CUDA_EMU_SITE) {
  const int lane = cuda_emu::thread_in_block() % 32;
  return cuda_emu::exchange(mask, x, lane / width * width + (source & (width - 1)), file, line);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T x, int flip, int width = 32, CUDA_EMU_SITE) {
  const int lane = cuda_emu::thread_in_block() % 32, source = lane ^ flip;
  return cuda_emu::exchange(mask, x, source / width > lane / width ? lane : source, file, line);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T x, int delta, int width = 32, CUDA_EMU_SITE) {
  const int lane = cuda_emu::thread_in_block() % 32;
  return cuda_emu::exchange(mask, x, lane % width < delta ? lane : lane - delta, file, line);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T x, int delta, int width = 32, CUDA_EMU_SITE) {
  const int lane = cuda_emu::thread_in_block() % 32;
  const int source = lane % width + delta < width ? lane + delta : lane;
  return cuda_emu::exchange(mask, x, source, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, CUDA_EMU_SITE) {
  return cuda_emu::ballot(mask, predicate, file, line);
}
inline bool __any_sync(uint32_t mask, bool predicate, CUDA_EMU_SITE) {
  return cuda_emu::ballot(mask, predicate, file, line) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate, CUDA_EMU_SITE) {
  return cuda_emu::ballot(mask, predicate, file, line) == mask;
}

template <typename T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p = old + x;
  return old;
}
inline int atomicMax(int* p, int x) {
  const int old = *p;
  if (x > old) *p = x;
  return old;
}

inline cudaError_t cudaGetLastError() {
  const int code = cuda_emu::engine.error_code;
  cuda_emu::engine.error_code = 0;
  return static_cast<cudaError_t>(code);
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > cuda_emu::kSharedOptInLimit) return cudaErrorInvalidValue;
  if (size_t(bytes) > cuda_emu::kSharedLimit) cuda_emu::engine.shared_limit = bytes;
  return cudaSuccess;
}

// What went wrong in the last launch, empty if nothing did.
extern "C" __attribute__((used, visibility("default"))) inline const char* cuda_emu_message() {
  return cuda_emu::engine.message.c_str();
}
