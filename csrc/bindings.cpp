// The Python face of the kernels. The only file that knows pybind11.
//
// Tensors arrive as integers (data_ptr) with their sizes: shapes, dtypes and devices were checked
// in Python, and so this module needs no torch header and serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "common/isa.h"
#ifdef IDDPM_WITH_CUDA
#include "common/device.h"
#endif

namespace py = pybind11;

namespace iddpm {

// What setup.py decided and why, as JSON; it generates the definition.
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
#ifdef IDDPM_WITH_CUDA
  info["cuda"].attr("update")(device_record());
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  check_cpu();
  m.def("build_info", &build_info,
        "What the build decided and why, and what this machine offers, as a dict.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use the instruction set `name` from now on and return the previous one's name.");
#ifdef IDDPM_WITH_CUDA
  m.def("cuda_error", [](int code) {
    return std::string(iddpm::cuda_error_name(code)) + ": " + iddpm::cuda_error_text(code);
  });
#endif
}
