#include "adamw_ema/adamw_ema.h"

#include "common/lanes.h"
#include "common/threads.h"
#include "common/tile.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

struct Factors {
  float grad_scale, beta1, beta2, kept, step_size, inverse_root, eps;
  float weight[kMaxEmas];
};

Factors factors_of(const AdamwEmaArgs& a) {
  const double step = a.step_tensor ? double(*a.step_tensor) : a.step;
  Factors f;
  f.grad_scale = a.grad_scale ? *a.grad_scale : 1.0f;
  f.beta1 = float(1.0 - a.beta1), f.beta2 = float(a.beta2);
  f.kept = float(1.0 - a.lr * a.weight_decay);
  f.step_size = float(a.lr / (1.0 - std::pow(a.beta1, step)));
  f.inverse_root = float(1.0 / std::sqrt(1.0 - std::pow(a.beta2, step)));
  f.eps = float(a.eps);
  for (int64_t k = 0; k < a.emas; ++k) f.weight[k] = float(1.0 - a.decays[k]);
  return f;
}

IDDPM_INLINE vf read(const int64_t address, DType dtype, int64_t at, int64_t n) {
  void* p = reinterpret_cast<void*>(static_cast<intptr_t>(address));
  if (dtype == DType::kBFloat16) return load_some(static_cast<const BFloat16*>(p) + at, n);
  if (dtype == DType::kFloat16) return load_some(static_cast<const Float16*>(p) + at, n);
  return load_some(static_cast<const float*>(p) + at, n);
}

IDDPM_INLINE void write(const int64_t address, DType dtype, int64_t at, vf value, int64_t n) {
  void* p = reinterpret_cast<void*>(static_cast<intptr_t>(address));
  if (dtype == DType::kBFloat16) return store_some(static_cast<BFloat16*>(p) + at, value, n);
  if (dtype == DType::kFloat16) return store_some(static_cast<Float16*>(p) + at, value, n);
  store_some(static_cast<float*>(p) + at, value, n);
}

// a + weight (b - a), exact at both ends.
IDDPM_INLINE vf lerp(vf a, vf b, float weight) {
  return weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
}

void update(const AdamwEmaArgs& a, const Factors& f, const int64_t* row, int64_t first,
            int64_t end) {
  constexpr DType kFloat = DType::kFloat32;
  for (int64_t at = first; at < end; at += kLanes) {
    const int64_t n = end - at < kLanes ? end - at : kLanes;
    const vf grad = f.grad_scale * read(row[kGrad], a.grad_dtype, at, n);
    const vf m = lerp(read(row[kExpAvg], kFloat, at, n), grad, f.beta1);
    const vf v = f.beta2 * read(row[kExpAvgSq], kFloat, at, n) + float(1.0 - a.beta2) * grad * grad;
    const vf denominator = sqrt(v) * f.inverse_root + f.eps;
    const vf p = f.kept * read(row[kParam], kFloat, at, n) - f.step_size * (m / denominator);
    write(row[kExpAvg], kFloat, at, m, n);
    write(row[kExpAvgSq], kFloat, at, v, n);
    write(row[kParam], kFloat, at, p, n);
    for (int64_t k = 0; k < a.emas; ++k) {
      const int64_t ema = row[kFirstEma + k];
      write(ema, kFloat, at, lerp(read(ema, kFloat, at, n), p, f.weight[k]), n);
    }
    if (row[kCopy]) write(row[kCopy], a.copy_dtype, at, p, n);
  }
}

}  // namespace

// The chunks of all tensors form one sequence, of which each thread takes an equal part.
void adamw_ema(const AdamwEmaArgs& a, int num_threads) {
  if (a.found_inf && *a.found_inf != 0.0f) return;
  const Factors f = factors_of(a);
  const int64_t width = kFirstEma + a.emas;
  int64_t chunks = 0, elements = 0;
  for (int64_t i = 0; i < a.tensors; ++i) {
    elements += a.table[i * width + kNumel];
    chunks += (a.table[i * width + kNumel] + kChunk - 1) / kChunk;
  }
  const int64_t parts = num_threads > 1 && elements >= kSerialBelow ? num_threads : 1;
  for_jobs(parts, parts, false, [&](int64_t part) {
    const int64_t begin = chunks * part / parts, end = chunks * (part + 1) / parts;
    int64_t before = 0;
    for (int64_t i = 0; i < a.tensors && before < end; ++i) {
      const int64_t* row = a.table + i * width;
      const int64_t here = (row[kNumel] + kChunk - 1) / kChunk;
      const int64_t from = begin > before ? begin - before : 0;
      const int64_t to = end - before < here ? end - before : here;
      if (from < to)
        update(a, f, row, from * kChunk, to * kChunk < row[kNumel] ? to * kChunk : row[kNumel]);
      before += here;
    }
  });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
