// The Python bindings of the kernels, the only file that uses pybind11.
//
// Tensors are passed as integers (data_ptr) with their sizes. Shapes, dtypes and devices are
// checked in Python, so this module needs no torch header and works with every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <tuple>

#include "adamw_ema/adamw_ema.h"
#include "ceilings/ceilings.h"
#include "checksum/checksum.h"
#include "common/amx.h"
#include "common/cache.h"
#include "common/isa.h"
#include "conv3x3/conv3x3.h"
#include "end_convs/end_convs.h"
#include "group_norm_silu/group_norm_silu.h"
#include "hybrid_loss/hybrid_loss.h"
#include "pixel_rows/pixel_rows.h"
#include "q_sample/q_sample.h"
#include "qkv_attention/qkv_attention.h"
#include "reverse_step/chain_step.h"
#include "reverse_step/reverse_step.h"
#include "unet_engine/unet_engine.h"
#include "vlb_terms/vlb_terms.h"
#include "vlb_to_all/vlb_to_all.h"
#ifdef IDDPM_WITH_CUDA
#include "common/device.h"
#endif

namespace py = pybind11;

namespace iddpm {

// The decisions of setup.py and their reasons, as JSON; setup.py generates the definition.
extern const char* const kBuildRecord;

}  // namespace iddpm

namespace {

using nogil = py::call_guard<py::gil_scoped_release>;

int parse_isa(const std::string& name) {
  std::string known;
  for (int isa = iddpm::kBase; isa <= iddpm::best_isa(); ++isa) {
    if (name == iddpm::kIsaNames[isa]) return isa;
    known += std::string(known.empty() ? "" : ", ") + iddpm::kIsaNames[isa];
  }
  throw py::value_error("IDDPM_ISA must be one of " + known + " on this CPU, got '" + name + "'");
}

void check_cpu() {
  if (iddpm::best_isa() < 0)
    throw py::import_error("iddpm_ext._C needs a CPU with SSE4.2; reinstall with IDDPM_CPP=0");
  if (const char* asked = std::getenv("IDDPM_ISA")) parse_isa(asked);
}

std::string set_isa(const std::string& name) {
  const char* previous = iddpm::kIsaNames[iddpm::current_isa()];
  iddpm::set_isa(parse_isa(name));
  return previous;
}

#ifdef IDDPM_WITH_CUDA
py::dict device_record() {
  int count = 0;
  const int code = iddpm::cuda_device_count(&count);
  py::dict record;
  record["devices"] = count;
  record["runtime_version"] = iddpm::cuda_runtime_version();
  record["driver_version"] = iddpm::cuda_driver_version();
  record["error"] = code == 0 ? "" : iddpm::cuda_error_name(code);
  return record;
}
#endif

py::dict build_info() {
  py::dict info = py::module_::import("json").attr("loads")(iddpm::kBuildRecord);
  info["isa"] = iddpm::kIsaNames[iddpm::current_isa()];
  py::list available;
  for (int isa = iddpm::kBase; isa <= iddpm::best_isa(); ++isa)
    available.append(iddpm::kIsaNames[isa]);
  info["isa_available"] = available;
  info["amx"] = iddpm::amx_absence();
  info["bf16"] = info["bf16_compiled"].cast<bool>() && iddpm::has_bf16();
#ifdef IDDPM_WITH_CUDA
  info["cuda"].attr("update")(device_record());
#endif
  return info;
}

// ---- arguments, as iddpm_ext/ops/arguments.py makes them

// Address, and the strides of sample, channel and pixel in elements.
using PlaneArgument = std::array<int64_t, 4>;
// Seed, stream + 16 * draw, and the addresses of samples and steps.
using KeyArgument = std::array<uint64_t, 4>;
// N, C, HW, T.
using SizeArgument = std::array<int64_t, 4>;

template <typename T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(value));
}

iddpm::Plane plane(const PlaneArgument& p) { return {address<void>(p[0]), p[1], p[2], p[3]}; }

iddpm::NoiseKey noise_key(const KeyArgument& k) {
  return {k[0], static_cast<uint32_t>(k[1]), address<const int64_t>(static_cast<int64_t>(k[2])),
          address<const int64_t>(static_cast<int64_t>(k[3]))};
}

// Sizes, the table of addresses, dtypes, factors on the device, numbers and decays: see `_run` of
// iddpm_ext/ops/adamw_ema/__init__.py.
iddpm::AdamwEmaArgs adamw_ema_args(const std::array<int64_t, 2>& size, int64_t table,
                                   const std::array<int, 2>& dtypes,
                                   const std::array<int64_t, 3>& factors,
                                   const std::array<double, 6>& numbers, int64_t decays) {
  return {size[0],
          size[1],
          address<const int64_t>(table),
          static_cast<iddpm::DType>(dtypes[0]),
          static_cast<iddpm::DType>(dtypes[1]),
          address<const float>(factors[0]),
          address<const float>(factors[1]),
          address<const float>(factors[2]),
          numbers[0],
          numbers[1],
          numbers[2],
          numbers[3],
          numbers[4],
          numbers[5],
          address<const double>(decays)};
}

// `compiled.py` of iddpm_ext/ops/conv3x3: N, H, W, C, K; images as address and distance of pixels;
// filters as address and the strides of column, channel, row and tap.
using ConvSize = std::array<int64_t, 5>;
using PixelsArgument = std::array<int64_t, 2>;
using FilterArgument = std::array<int64_t, 5>;

iddpm::FilterView filter(const FilterArgument& f) {
  return {address<float>(f[0]), f[1], f[2], f[3], f[4]};
}

iddpm::Conv3x3Args conv3x3_args(const ConvSize& size, int dtype, const PixelsArgument& in,
                                const FilterArgument& weight, int64_t bias,
                                const PixelsArgument& out, int64_t tile, int64_t upscale) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          size[4],
          static_cast<iddpm::DType>(dtype),
          address<const void>(in[0]),
          in[1],
          filter(weight),
          address<const float>(bias),
          address<void>(out[0]),
          out[1],
          tile,
          upscale};
}

iddpm::Conv3x3WeightBwdArgs conv3x3_weight_bwd_args(const ConvSize& size, int dtype,
                                                    const PixelsArgument& in,
                                                    const PixelsArgument& dy,
                                                    const FilterArgument& dweight, int64_t dbias,
                                                    int64_t tile, int64_t upscale) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          size[4],
          static_cast<iddpm::DType>(dtype),
          address<const void>(in[0]),
          in[1],
          address<const void>(dy[0]),
          dy[1],
          filter(dweight),
          address<float>(dbias),
          tile,
          upscale};
}

iddpm::HybridLossArgs hybrid_loss_args(const SizeArgument& size, const PlaneArgument& model_output,
                                       int dtype, const PlaneArgument& x_0,
                                       const PlaneArgument& x_t, const PlaneArgument& noise,
                                       const KeyArgument& key, int64_t t, int64_t table,
                                       int64_t mse, int64_t vlb, const PlaneArgument& gradient) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          plane(model_output),
          static_cast<iddpm::DType>(dtype),
          plane(x_0),
          plane(x_t),
          plane(noise),
          noise_key(key),
          address<const int64_t>(t),
          address<const float>(table),
          address<float>(mse),
          address<float>(vlb),
          plane(gradient)};
}

iddpm::VlbTermsArgs vlb_terms_args(const SizeArgument& size, const PlaneArgument& model_output,
                                   int dtype, bool learned, const PlaneArgument& x_0,
                                   const PlaneArgument& x_t, int64_t t, int64_t table, bool clip,
                                   bool exact, int64_t terms, const PlaneArgument& gradient) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          plane(model_output),
          static_cast<iddpm::DType>(dtype),
          learned,
          plane(x_0),
          plane(x_t),
          address<const int64_t>(t),
          address<const float>(table),
          clip,
          exact,
          address<float>(terms),
          plane(gradient)};
}

// Address and sample stride of images that are dense within a sample.
using DenseArgument = std::array<int64_t, 2>;

iddpm::VlbToAllArgs vlb_to_all_args(const std::array<int64_t, 3>& size,
                                    const DenseArgument& model_output, bool learned,
                                    const DenseArgument& x_0, const DenseArgument& x_t,
                                    int64_t rows, int64_t targets, bool clip, bool exact,
                                    int64_t terms) {
  const int64_t count = size[2];
  const auto dense = [&](const DenseArgument& d) {
    return iddpm::Plane{address<void>(d[0]), d[1], count, 1};
  };
  return {size[0],
          size[1],
          count,
          dense(model_output),
          learned,
          dense(x_0),
          dense(x_t),
          address<const float>(rows),
          address<const int64_t>(targets),
          clip,
          exact,
          address<float>(terms)};
}

iddpm::QSampleArgs q_sample_args(const SizeArgument& size, const PlaneArgument& x_0, int64_t t,
                                 int64_t table, const PlaneArgument& noise, const KeyArgument& key,
                                 const PlaneArgument& x_t) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          plane(x_0),
          address<const int64_t>(t),
          address<const float>(table),
          plane(noise),
          noise_key(key),
          plane(x_t)};
}

iddpm::ReverseStepArgs reverse_step_args(const SizeArgument& size, const PlaneArgument& x_t,
                                         const PlaneArgument& model_output, int dtype, bool learned,
                                         int64_t t, int64_t table, const PlaneArgument& noise,
                                         const KeyArgument& key, bool clip,
                                         const PlaneArgument& x_prev, const PlaneArgument& x_0) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          plane(x_t),
          plane(model_output),
          static_cast<iddpm::DType>(dtype),
          learned,
          address<const int64_t>(t),
          address<const float>(table),
          plane(noise),
          noise_key(key),
          clip,
          plane(x_prev),
          plane(x_0)};
}

#ifdef IDDPM_WITH_CUDA
// `launch_step` of iddpm_ext/sampling/cuda_chain.py: addresses are those of t, table, seed, samples
// and scale.
iddpm::ChainStepArgs chain_step_args(const SizeArgument& size, const PlaneArgument& x,
                                     const PlaneArgument& model_output,
                                     const PlaneArgument& unlabelled, int dtype, bool learned,
                                     const std::array<int64_t, 5>& addresses, int64_t stream_draw,
                                     bool clip) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          plane(x),
          plane(model_output),
          plane(unlabelled),
          static_cast<iddpm::DType>(dtype),
          learned,
          address<const int64_t>(addresses[0]),
          address<const float>(addresses[1]),
          address<const int64_t>(addresses[2]),
          address<const int64_t>(addresses[3]),
          address<const float>(addresses[4]),
          static_cast<uint32_t>(stream_draw),
          clip};
}

// iddpm_ext/ops/pixel_rows.py: rows and channels, address and pitch.
using RowsArgument = std::array<int64_t, 2>;

iddpm::PixelRows pixel_rows(const RowsArgument& r) { return {address<void>(r[0]), r[1]}; }

iddpm::ChannelSumsArgs channel_sums_args(const std::array<int64_t, 2>& size, int dtype,
                                         const RowsArgument& x, int64_t workspace, int64_t sums) {
  return {size[0],
          size[1],
          static_cast<iddpm::DType>(dtype),
          pixel_rows(x),
          address<float>(workspace),
          address<float>(sums)};
}

iddpm::SettleArgs settle_args(const std::array<int64_t, 2>& size, int dtype, const RowsArgument& x,
                              const RowsArgument& residual, int64_t bias) {
  return {size[0],
          size[1],
          static_cast<iddpm::DType>(dtype),
          pixel_rows(x),
          pixel_rows(residual),
          address<const float>(bias)};
}

iddpm::InterleaveArgs interleave_args(const std::array<int64_t, 4>& size, int dtype, int64_t z,
                                      int64_t y) {
  return {size[0],          size[1],         size[2], size[3], static_cast<iddpm::DType>(dtype),
          address<void>(z), address<void>(y)};
}

// iddpm_ext/engines/cuda/kernels.py: N, H, W and the channels in and out.
iddpm::FirstConvArgs first_conv_args(const std::array<int64_t, 5>& size, int dtype,
                                     const PlaneArgument& x, int64_t weight, int64_t y) {
  return {size[0],         size[1],
          size[2],         size[3],
          size[4],         static_cast<iddpm::DType>(dtype),
          plane(x),        address<const float>(weight),
          address<void>(y)};
}

iddpm::LastConvArgs last_conv_args(const std::array<int64_t, 5>& size, int dtype, int64_t x,
                                   int64_t weight, int64_t bias, int64_t y) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          size[4],
          static_cast<iddpm::DType>(dtype),
          address<const void>(x),
          address<const float>(weight),
          address<const float>(bias),
          address<float>(y)};
}
#endif

// `_Call.input` of iddpm_ext/ops/group_norm_silu/compiled.py: N, C, C1, HW, groups; dtype,
// channels_last, silu; x, x2; channel_bias with its row stride, weight, bias, scale and shift with
// theirs, mean, rstd.
using GroupNormArgument = std::tuple<std::array<int64_t, 5>, int, bool, bool, PlaneArgument,
                                     PlaneArgument, std::array<int64_t, 10>>;

iddpm::GroupNormInput group_norm_input(const GroupNormArgument& argument) {
  const auto& [size, dtype, channels_last, silu, x, x2, p] = argument;
  return {size[0],
          size[1],
          size[2],
          size[3],
          size[4],
          static_cast<iddpm::DType>(dtype),
          channels_last,
          silu,
          plane(x),
          plane(x2),
          address<const float>(p[0]),
          p[1],
          address<const float>(p[2]),
          address<const float>(p[3]),
          address<const float>(p[4]),
          address<const float>(p[6]),
          p[5],
          p[7],
          address<float>(p[8]),
          address<float>(p[9])};
}

iddpm::GroupNormSiluArgs group_norm_silu_args(const GroupNormArgument& in, float eps,
                                              const PlaneArgument& residual,
                                              const PlaneArgument& sum, const PlaneArgument& y,
                                              int64_t workspace) {
  return {group_norm_input(in), eps,      plane(residual),
          plane(sum),           plane(y), address<float>(workspace)};
}

iddpm::GroupNormSiluBwdArgs group_norm_silu_bwd_args(
    const GroupNormArgument& in, const PlaneArgument& dy, const PlaneArgument& dsum,
    const PlaneArgument& dx, const PlaneArgument& dx2, const std::array<int64_t, 5>& gradients,
    int64_t workspace) {
  const auto gradient = [&](int i) { return address<float>(gradients[i]); };
  return {group_norm_input(in),
          plane(dy),
          plane(dsum),
          plane(dx),
          plane(dx2),
          gradient(0),
          gradient(1),
          gradient(2),
          gradient(3),
          gradient(4),
          address<float>(workspace)};
}

// `_input` of iddpm_ext/ops/qkv_attention/compiled.py: N, T, heads, d, head step, part step; dtype;
// qkv; statistics.
using AttentionArgument = std::tuple<std::array<int64_t, 6>, int, PlaneArgument, int64_t>;

iddpm::QkvAttentionInput attention_input(const AttentionArgument& argument) {
  const auto& [size, dtype, qkv, statistics] = argument;
  return {size[0],
          size[1],
          size[2],
          size[3],
          size[4],
          size[5],
          static_cast<iddpm::DType>(dtype),
          plane(qkv),
          address<float>(statistics)};
}

iddpm::QkvAttentionArgs qkv_attention_args(const AttentionArgument& in, const PlaneArgument& out,
                                           int64_t workspace) {
  return {attention_input(in), plane(out), address<float>(workspace)};
}

iddpm::QkvAttentionBwdArgs qkv_attention_bwd_args(const AttentionArgument& in,
                                                  const PlaneArgument& dout,
                                                  const PlaneArgument& dqkv, int64_t workspace) {
  return {attention_input(in), plane(dout), plane(dqkv), address<float>(workspace)};
}

// Binds `<op>_cpu(arguments..., num_threads)`; `make` turns the Python arguments into the
// launcher's struct, and `choose` gives the kernel for the instruction set in use.
template <typename Result, typename Args, typename... In>
void bind_cpu(py::module_& m, const char* name, Args (*make)(In...),
              Result (*(*choose)())(const Args&, int)) {
  m.def(
      name,
      [make, choose](In... in, int num_threads) { return choose()(make(in...), num_threads); },
      nogil());
}

// Binds `<op>_cuda(arguments..., stream)`, which returns a CUDA error code.
template <typename Args, typename... In>
void bind_cuda(py::module_& m, const char* name, Args (*make)(In...),
               int (*launch)(const Args&, void*)) {
  m.def(
      name,
      [make, launch](In... in, int64_t stream) {
        return launch(make(in...), address<void>(stream));
      },
      nogil());
}

#define IDDPM_BIND_CPU(m, op) \
  bind_cpu(m, #op "_cpu", &op##_args, +[] { return IDDPM_DISPATCH(op); })
#ifdef IDDPM_WITH_CUDA
#define IDDPM_BIND(m, op) \
  IDDPM_BIND_CPU(m, op);  \
  bind_cuda(m, #op "_cuda", &op##_args, &iddpm::op##_cuda)
#else
#define IDDPM_BIND(m, op) IDDPM_BIND_CPU(m, op)
#endif

// The number of ranges and the address of their table; the address of the sum, for CUDA.
iddpm::ChecksumArgs checksum_args(int64_t ranges, int64_t table, int64_t sum) {
  return {ranges, address<const int64_t>(table), address<uint64_t>(sum)};
}

// Whether dictionaries hold what they held: `Entries` of iddpm_ext/engines/structure.py. By
// references alone: Python's own comparison touches every object, which after a chain is in no
// cache.
bool entries_hold(const py::list& then) {
  const Py_ssize_t size = PyList_GET_SIZE(then.ptr());
  for (Py_ssize_t i = 0; i < size;) {
    PyObject* table = PyList_GET_ITEM(then.ptr(), i++);
    if (!PyDict_Check(table)) return false;  // a key: the dictionary before has fewer now
    bool same = true;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(table);
#endif
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (same && PyDict_Next(table, &at, &key, &value)) {
      same = i + 1 < size && PyList_GET_ITEM(then.ptr(), i) == key &&
             PyList_GET_ITEM(then.ptr(), i + 1) == value;
      i += 2;
    }
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
    if (!same) return false;
  }
  return true;
}

// See unet_engine/plan.h; pointers as integers.
int64_t run_plan(intptr_t ops, int64_t count, int64_t n, int64_t threads, intptr_t input,
                 intptr_t output, intptr_t embedding, intptr_t embedding_row, intptr_t shared,
                 int64_t shared_floats, intptr_t scratch, int64_t scratch_floats) {
  const iddpm::PlanRun run{reinterpret_cast<const int64_t*>(ops),
                           count,
                           n,
                           threads,
                           reinterpret_cast<const float*>(input),
                           reinterpret_cast<float*>(output),
                           reinterpret_cast<const float*>(embedding),
                           reinterpret_cast<const int64_t*>(embedding_row),
                           reinterpret_cast<float*>(shared),
                           shared_floats,
                           reinterpret_cast<float*>(scratch),
                           scratch_floats};
  return IDDPM_DISPATCH(unet_engine)(run);
}

// For the planner of iddpm_ext/engines/cpu.
void bind_plan(py::module_& m) {
  using iddpm::Kind;
  // Local: the tests load a second build of this module into one process.
  py::enum_<Kind>(m, "RowKind", "The kernel of a plan's row.", py::module_local())
      .value("INPUT", Kind::kInput)
      .value("OUTPUT", Kind::kOutput)
      .value("GEMM", Kind::kGemm)
      .value("CONV", Kind::kConv)
      .value("WINOGRAD", Kind::kWinograd)
      .value("GROUP_NORM", Kind::kGroupNorm)
      .value("ATTENTION", Kind::kAttention)
      .value("GEMM_BF16", Kind::kGemmBf16)
      .value("WINOGRAD_BF16", Kind::kWinogradBf16)
      .value("TILE_PRODUCT", Kind::kTileProduct)
      .value("NORM_OPERAND", Kind::kNormOperand)
      .value("ROUND", Kind::kRound)
      .value("TILE_ATTENTION", Kind::kTileAttention);
  m.attr("ROW_WORDS") = iddpm::kOpWords;
  m.attr("PANEL") = iddpm::kPanel;
  // Scratch in floats, per thread or (_shared) of the team.
  m.def("conv_scratch", &iddpm::conv_scratch);
  m.def("gemm_bf16_scratch", &iddpm::gemm_bf16_scratch);
  m.def("group_norm_shared", &iddpm::group_norm_shared);
  m.def("tile_attention_scratch", &iddpm::tile_attention_scratch);
  m.def("second_level_bytes", &iddpm::second_level_bytes);
  m.def("winograd_block", [](int64_t tile, int64_t channels, int64_t columns, bool bf16) {
    return iddpm::winograd_block(tile, channels, columns, bf16, iddpm::second_level_bytes());
  });
  m.def("winograd_scratch", &iddpm::winograd_scratch);
  m.def("winograd_shared", &iddpm::winograd_shared);
  m.def("winograd_bf16_scratch", &iddpm::winograd_bf16_scratch);
  m.def("winograd_bf16_shared", &iddpm::winograd_bf16_shared);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  check_cpu();
  m.def("build_info", &build_info,
        "What the build decided and why, and what this machine offers, as a dict.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use the instruction set `name` from now on and return the previous one's name.");
  m.def("emulate_amx", &iddpm::emulate_amx, py::arg("on"),
        "Turn the emulation of AMX kernels in plain C++ on or off; false if it is not built.");
  m.def(
      "has_tiles", [] { return iddpm::amx_kernels() != iddpm::kNoAmx; },
      "Whether AMX kernels can run, natively or emulated.");
  IDDPM_BIND(m, adamw_ema);
  IDDPM_BIND(m, checksum);
  IDDPM_BIND_CPU(m, conv3x3);
  IDDPM_BIND_CPU(m, conv3x3_weight_bwd);
  IDDPM_BIND(m, group_norm_silu);
  IDDPM_BIND(m, group_norm_silu_bwd);
  IDDPM_BIND(m, hybrid_loss);
  IDDPM_BIND(m, q_sample);
  IDDPM_BIND_CPU(m, qkv_attention);
  IDDPM_BIND_CPU(m, qkv_attention_bwd);
  m.def("attention_workspace", &iddpm::attention_workspace, "Floats per thread; see its header.");
  m.def("attention_bwd_workspace", &iddpm::attention_bwd_workspace);
  IDDPM_BIND(m, reverse_step);
#ifdef IDDPM_WITH_CUDA
  bind_cuda(m, "chain_step_cuda", &chain_step_args, &iddpm::chain_step_cuda);
  bind_cuda(m, "channel_sums_cuda", &channel_sums_args, &iddpm::channel_sums_cuda);
  bind_cuda(m, "settle_cuda", &settle_args, &iddpm::settle_cuda);
  bind_cuda(m, "interleave_cuda", &interleave_args, &iddpm::interleave_cuda);
  bind_cuda(m, "first_conv_cuda", &first_conv_args, &iddpm::first_conv_cuda);
  bind_cuda(m, "last_conv_cuda", &last_conv_args, &iddpm::last_conv_cuda);
  m.def("channel_sums_chunks", &iddpm::channel_sums_chunks);
#endif
  IDDPM_BIND(m, vlb_terms);
  IDDPM_BIND(m, vlb_to_all);
  m.def(
      "multiply_add_burst",
      [](int64_t rounds) { return IDDPM_DISPATCH(multiply_add_burst)(rounds); }, nogil(),
      "Spend `rounds` rounds of multiply-adds in registers; returns their FLOPs.");
  m.def("entries_hold", &entries_hold, "Whether dictionaries hold the same objects as then.");
  m.def("unet_engine", &run_plan, nogil(), "Run a plan of csrc/unet_engine/plan.h.");
  bind_plan(m);
#ifdef IDDPM_WITH_CUDA
  m.def("cuda_error", [](int code) {
    return std::string(iddpm::cuda_error_name(code)) + ": " + iddpm::cuda_error_text(code);
  });
#endif
}
