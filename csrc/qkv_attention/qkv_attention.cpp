#include "qkv_attention/qkv_attention.h"

#include "common/threads.h"
#include "qkv_attention/attention_cpu.h"

namespace iddpm {
namespace IDDPM_ISA {
namespace {

template <typename T>
void run(const QkvAttentionArgs& a, int num_threads) {
  const QkvAttentionInput& in = a.in;
  const int64_t work = 2 * in.n * in.heads * in.tokens * in.tokens * in.width;
  const int64_t floats = attention_workspace(in.tokens, in.width);
  for_threads(num_threads, work < kAttentionSerialBelow, [&](int64_t thread, int64_t threads) {
    attend_share<T>(a, thread, threads, a.workspace + thread * floats);
  });
}

}  // namespace

void qkv_attention(const QkvAttentionArgs& args, int num_threads) {
  switch (args.in.dtype) {
    case DType::kFloat32:
      return run<float>(args, num_threads);
    case DType::kBFloat16:
      return run<BFloat16>(args, num_threads);
    case DType::kFloat16:
      return run<Float16>(args, num_threads);
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
