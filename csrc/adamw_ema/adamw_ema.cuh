// One launch, or a few, for all tensors: their addresses are a kernel argument, so that nothing is
// copied to the device and a CUDA graph can contain the call. A block finds its tensor by binary
// search and updates 4096 of its elements, four per thread at a time.
#pragma once

#include "adamw_ema/adamw_ema.h"
#include "common/cuda_compat.cuh"

namespace iddpm {

constexpr int kAdamwThreads = 256;
constexpr int64_t kAdamwElements = 16 * kAdamwThreads;

// A kernel's arguments may take 32,764 bytes from CUDA 12.1 on, 4 KB before.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kAdamwPool = 448;
#else
constexpr int kAdamwPool = 3968;
#endif

// Rows of AdamwEmaArgs::table with two more numbers in front: the first block of the tensor, and
// whether all of its addresses are aligned for vectors.
struct AdamwEmaBatch {
  int tensors, emas;
  DType grad_dtype, copy_dtype;
  const float *step_tensor, *grad_scale, *found_inf;
  float step, lr, log_beta1, log_beta2, beta1_rest, beta2, beta2_rest, eps, kept;
  float weight[kMaxEmas];
  int64_t pool[kAdamwPool];
};

enum AdamwEmaExtra { kFirstBlock, kAligned, kRow };

template <typename T>
IDDPM_DEVICE T* at_address(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

template <typename T>
IDDPM_DEVICE void read_four(int64_t address, int64_t at, int64_t end, bool vector,
                            float (&values)[4]) {
  const T* p = at_address<const T>(address) + at;
  if (vector) {
    load_floats<T, 4>(p, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = at + i < end ? to_float(p[i]) : 0.0f;
  }
}

template <typename T>
IDDPM_DEVICE void write_four(int64_t address, int64_t at, int64_t end, bool vector,
                             const float (&values)[4]) {
  T* p = at_address<T>(address) + at;
  if (vector) {
    store_floats<T, 4>(p, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < end) p[i] = from_float<T>(values[i]);
  }
}

IDDPM_DEVICE float lerp(float a, float b, float weight) {
  return weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
}

// The tensor of the batch that `block` belongs to.
IDDPM_DEVICE const int64_t* find_tensor(const AdamwEmaBatch& a, int width, int64_t block) {
  int low = 0, high = a.tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.pool[middle * width + kFirstBlock] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return a.pool + low * width;
}

template <typename Grad>
__global__ void __launch_bounds__(kAdamwThreads) adamw_ema_kernel(const AdamwEmaBatch a) {
  if (a.found_inf != nullptr && *a.found_inf != 0.0f) return;
  const int width = kRow + kFirstEma + a.emas;
  const int64_t* entry = find_tensor(a, width, blockIdx.x);
  const int64_t* row = entry + kRow;
  const int64_t numel = row[kNumel];
  const int64_t first = (blockIdx.x - entry[kFirstBlock]) * kAdamwElements;

  const float step = a.step_tensor != nullptr ? *a.step_tensor : a.step;
  const float scale = a.grad_scale != nullptr ? *a.grad_scale : 1.0f;
  // 1 - beta^step without cancellation, and without double precision.
  const float step_size = a.lr / -expm1f(step * a.log_beta1);
  const float inverse_root = 1.0f / sqrtf(-expm1f(step * a.log_beta2));

#pragma unroll 1
  for (int64_t offset = 4 * int64_t(threadIdx.x); offset < kAdamwElements;
       offset += 4 * kAdamwThreads) {
    const int64_t at = first + offset;
    if (at >= numel) break;
    const bool vector = entry[kAligned] != 0 && at + 4 <= numel;
    float grad[4], p[4], m[4], v[4];
    read_four<Grad>(row[kGrad], at, numel, vector, grad);
    read_four<float>(row[kParam], at, numel, vector, p);
    read_four<float>(row[kExpAvg], at, numel, vector, m);
    read_four<float>(row[kExpAvgSq], at, numel, vector, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float g = grad[i] * scale;
      m[i] = lerp(m[i], g, a.beta1_rest);
      v[i] = a.beta2 * v[i] + a.beta2_rest * g * g;
      p[i] = a.kept * p[i] - step_size * (m[i] / (sqrtf(v[i]) * inverse_root + a.eps));
    }
    write_four<float>(row[kExpAvg], at, numel, vector, m);
    write_four<float>(row[kExpAvgSq], at, numel, vector, v);
    write_four<float>(row[kParam], at, numel, vector, p);
    for (int k = 0; k < a.emas; ++k) {
      float ema[4];
      read_four<float>(row[kFirstEma + k], at, numel, vector, ema);
#pragma unroll
      for (int i = 0; i < 4; ++i) ema[i] = lerp(ema[i], p[i], a.weight[k]);
      write_four<float>(row[kFirstEma + k], at, numel, vector, ema);
    }
    if (row[kCopy] == 0) continue;
    if (a.copy_dtype == DType::kBFloat16)
      write_four<__nv_bfloat16>(row[kCopy], at, numel, vector, p);
    else if (a.copy_dtype == DType::kFloat16)
      write_four<__half>(row[kCopy], at, numel, vector, p);
    else
      write_four<float>(row[kCopy], at, numel, vector, p);
  }
}

inline AdamwEmaBatch adamw_ema_batch(const AdamwEmaArgs& a) {
  AdamwEmaBatch batch{};
  batch.emas = static_cast<int>(a.emas);
  batch.grad_dtype = a.grad_dtype, batch.copy_dtype = a.copy_dtype;
  batch.step_tensor = a.step_tensor, batch.grad_scale = a.grad_scale;
  batch.found_inf = a.found_inf;
  batch.step = static_cast<float>(a.step), batch.lr = static_cast<float>(a.lr);
  batch.log_beta1 = static_cast<float>(std::log(a.beta1));
  batch.log_beta2 = static_cast<float>(std::log(a.beta2));
  batch.beta1_rest = static_cast<float>(1.0 - a.beta1);
  batch.beta2 = static_cast<float>(a.beta2);
  batch.beta2_rest = static_cast<float>(1.0 - a.beta2);
  batch.eps = static_cast<float>(a.eps);
  batch.kept = static_cast<float>(1.0 - a.lr * a.weight_decay);
  for (int64_t k = 0; k < a.emas; ++k) batch.weight[k] = static_cast<float>(1.0 - a.decays[k]);
  return batch;
}

inline bool aligned_for_vectors(const int64_t* row, const AdamwEmaArgs& a) {
  const int64_t grad_bytes = a.grad_dtype == DType::kFloat32 ? 16 : 8;
  const int64_t copy_bytes = a.copy_dtype == DType::kFloat32 ? 16 : 8;
  for (int64_t field = kParam; field < kFirstEma + a.emas; ++field) {
    const int64_t bytes = field == kGrad ? grad_bytes : field == kCopy ? copy_bytes : 16;
    if (row[field] % bytes != 0) return false;
  }
  return true;
}

inline void adamw_ema_launch_batch(const AdamwEmaBatch& batch, int64_t blocks, void* stream) {
  const dim3 grid(static_cast<unsigned>(blocks)), block(kAdamwThreads);
  if (batch.grad_dtype == DType::kBFloat16)
    IDDPM_LAUNCH(adamw_ema_kernel<__nv_bfloat16>, grid, block, 0, stream, batch);
  else if (batch.grad_dtype == DType::kFloat16)
    IDDPM_LAUNCH(adamw_ema_kernel<__half>, grid, block, 0, stream, batch);
  else
    IDDPM_LAUNCH(adamw_ema_kernel<float>, grid, block, 0, stream, batch);
}

inline void adamw_ema_launch(const AdamwEmaArgs& a, void* stream) {
  AdamwEmaBatch batch = adamw_ema_batch(a);
  const int64_t fields = kFirstEma + a.emas, width = kRow + fields;
  const int capacity = kAdamwPool / static_cast<int>(width);
  int64_t blocks = 0;
  for (int64_t i = 0; i < a.tensors; ++i) {
    const int64_t* row = a.table + i * fields;
    if (row[kNumel] > 0) {
      int64_t* entry = batch.pool + batch.tensors++ * width;
      entry[kFirstBlock] = blocks;
      entry[kAligned] = aligned_for_vectors(row, a);
      for (int64_t field = 0; field < fields; ++field) entry[kRow + field] = row[field];
      blocks += (row[kNumel] + kAdamwElements - 1) / kAdamwElements;
    }
    if (batch.tensors > 0 && (batch.tensors == capacity || i + 1 == a.tensors)) {
      adamw_ema_launch_batch(batch, blocks, stream);
      batch.tensors = 0, blocks = 0;
    }
  }
}

}  // namespace iddpm
