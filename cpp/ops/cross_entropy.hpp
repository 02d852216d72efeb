// Cross-entropy of logits along one axis on the CPU: forward, VJP, JVP and the JVP of the VJP.
// Plain C++; what the arguments mean is docs/ops/cross_entropy.md.
#pragma once
#include <cstdint>

#include "runtime/views.hpp"

namespace tilewise {

// Null where absent, zero or not wanted. Numbers of rows, (outer, inner), have the type that is
// computed with.
struct CrossEntropyProblem {
  int64_t outer = 0, columns = 0, inner = 0;
  int64_t ignore_index = -100;
  double label_smoothing = 0, z_loss = 0, softcap = 0;  // a softcap of 0 is none
  View3 x, probabilities;                               // one of probabilities and targets is given
  const int64_t* targets = nullptr;                     // (outer, inner), contiguous
  const void* weight = nullptr;  // (columns), of the type that is computed with
  View3 loss, lse, z, m, log_l, total;
  View3 g_loss, g_lse, g_z, tx, tprobabilities, tg_loss, tg_lse, tg_z;
  View3 dx, dprobabilities, t_loss, t_lse, t_z;
};

// One target's functions. They throw std::bad_alloc; nothing is promised of the outputs then.
struct CrossEntropyFunctions {
  void (*forward)(const CrossEntropyProblem&);  // writes loss, lse, z, m, log_l, total
  void (*vjp)(const CrossEntropyProblem&);      // reads m, log_l, total, g_*; writes dx, where also
                                                // x may be, and dprobabilities
  void (*jvp)(const CrossEntropyProblem&);      // reads tangents, writes t_*
  void (*vjp_jvp)(const CrossEntropyProblem&);  // the results are the tangents of those of vjp
};
struct CrossEntropyKernels {
  CrossEntropyFunctions f32, f64;  // f32 also of 16 bits
};

const CrossEntropyFunctions& cross_entropy_functions(Storage storage);  // of the active target

}  // namespace tilewise
