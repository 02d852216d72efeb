// Softmax, log-softmax and logsumexp along one axis on the CPU: forward, VJP, JVP and the JVP of
// the VJP. Plain C++; what the arguments mean is docs/ops/softmax.md.
#pragma once
#include <cstdint>

#include "runtime/views.hpp"

namespace tilewise {

// Null where absent, zero or not wanted. Numbers of rows, (outer, inner), have the type that is
// computed with.
struct SoftmaxProblem {
  int64_t outer = 0, columns = 0, inner = 0;
  double scale = 1;  // the logits are scale x
  View3 x, where, sink;
  View3 y, log_y, lse, m, log_l;  // m is the maximum of x, or what the sink makes of it
  View3 gy, gz, gl, tx, tsink, tgy, tgz, tgl;
  View3 dx, dsink, ty, tz, tl;
};

// One target's functions. They throw std::bad_alloc; nothing is promised of the outputs then.
struct SoftmaxFunctions {
  void (*forward)(const SoftmaxProblem&);  // writes y, log_y, lse, m, log_l
  void (*vjp)(const SoftmaxProblem&);      // reads m, log_l and cotangents, writes dx, dsink
  void (*jvp)(const SoftmaxProblem&);      // reads m, log_l and tangents, writes ty, tz, tl
  void (*vjp_jvp)(const SoftmaxProblem&);  // the results are the tangents of dx and dsink
};
struct SoftmaxKernels {
  SoftmaxFunctions f32, f64;  // f32 also of 16 bits
};

const SoftmaxFunctions& softmax_functions(Storage storage);  // of the active target

}  // namespace tilewise
