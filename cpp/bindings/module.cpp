#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "ops/attention.hpp"
#include "runtime/thread_pool.hpp"
#include "simd/targets.hpp"

namespace nb = nanobind;

namespace tilewise {

void bind_attention(nb::module_& m);
void bind_cross_entropy(nb::module_& m);
void bind_softmax(nb::module_& m);

namespace {

double fma_peak(const std::string& dtype, double seconds) {
  if (dtype != "float32" && dtype != "float64")
    throw std::invalid_argument("fma_peak: dtype must be 'float32' or 'float64', got '" + dtype +
                                "'");
  if (!(seconds >= 0 && seconds <= 60))
    throw std::invalid_argument("fma_peak: seconds must be from 0 to 60");
  const AttentionKernels& kernels = attention_kernels();
  nb::gil_scoped_release released;
  return (dtype == "float32" ? kernels.fma_peak_f32 : kernels.fma_peak_f64)(seconds);
}

}  // namespace
}  // namespace tilewise

NB_MODULE(_core, m) {
  using namespace tilewise;
  m.doc() = "The compiled kernels. Private: use tilewise.numpy.";
  m.def(
      "target", [] { return std::string(target_name(active_target())); },
      "The instruction set in use.");
  m.def("targets", &available_targets, "The instruction sets this CPU can run, best first.");
  m.def("set_target", &set_target, nb::arg("name"), "Use the named instruction set from now on.");
  m.def("num_threads", &num_threads, "Threads that a call may use.");
  m.def("set_num_threads", &set_num_threads, nb::arg("n"), "Let a call use n threads from now on.");
  m.def("fma_peak", &fma_peak, nb::arg("dtype"), nb::arg("seconds"),
        "Fused multiply-adds of one core in GFLOP/s.");
  bind_attention(m);
  bind_cross_entropy(m);
  bind_softmax(m);
}
