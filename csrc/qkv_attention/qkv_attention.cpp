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
  const auto tiles = IDDPM_AMX(qkv_attention_tiles);
  if (tiles && args.in.dtype == DType::kBFloat16) return tiles(args, num_threads);
  with_element(args.in.dtype, [&](auto element) { run<decltype(element)>(args, num_threads); });
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
