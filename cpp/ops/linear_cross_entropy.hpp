// Cross-entropy of hidden weight^T + bias on the CPU, without storing tokens x classes: forward
// (with gradients in the same pass where asked), VJP, JVP and the JVP of the VJP. Plain C++; what
// the arguments mean is docs/ops/linear_cross_entropy.md.
#pragma once
#include <cstdint>

#include "runtime/views.hpp"

namespace tilewise {

struct Matrix {  // columns are contiguous; one row is a vector
  const void* data = nullptr;
  int64_t row = 0;
  Storage storage = Storage::kFloat32;
  explicit operator bool() const { return data != nullptr; }
};

// Classes of this call are [v_start, v_start + V) of v_total; a target outside them is picked by
// another shard.
struct CrossEntropyOptions {
  double label_smoothing = 0, z_loss = 0;
  double softcap = 0;  // 0: none
  int64_t ignore_index = -100;
  int64_t v_start = 0, v_total = 0;
  double gradient_filter = 0;                // entries of dz below this times |g| are left out
  int64_t token_chunk = 0, vocab_chunk = 0;  // 0: chosen by size
  bool accumulate_dweight = false;
};

// One number a token, (T): of the type that is computed with. Null where absent or not wanted.
struct CrossEntropyRows {
  const void *m = nullptr, *log_l = nullptr, *mass = nullptr, *entropy = nullptr;
  const void *g = nullptr, *g_lse = nullptr, *g_z = nullptr, *g_entropy = nullptr;
  const void *tg = nullptr, *tg_lse = nullptr, *tg_z = nullptr, *tg_entropy = nullptr;
};

// Null where not wanted. picked is the sum of t s over the classes of this call and mass that of t.
struct CrossEntropyResults {
  void *loss = nullptr, *lse = nullptr, *m = nullptr, *log_l = nullptr, *picked = nullptr;
  void *mass = nullptr, *z_loss = nullptr, *entropy = nullptr;
  int64_t* argmax = nullptr;
};

struct LinearCrossEntropyProblem {
  int64_t T = 0, C = 0, V = 0;
  Matrix hidden, weight, bias;         // (T, C), (V, C), (V)
  const int64_t* targets = nullptr;    // (T)
  const void* class_weight = nullptr;  // (V), of the type that is computed with
  CrossEntropyOptions options;
  CrossEntropyRows rows;
  CrossEntropyResults out;
  Matrix dhidden, dweight, dbias;  // stored as the inputs or as what is computed with
  Matrix thidden, tweight, tbias;  // null for zero
};

// One target's functions. They throw std::bad_alloc; nothing is promised of the outputs then.
struct LinearCrossEntropyFunctions {
  // Writes what is wanted of `out`; with gradients wanted, those for cotangents rows.g of the loss.
  void (*forward)(const LinearCrossEntropyProblem&);
  void (*vjp)(const LinearCrossEntropyProblem&);  // reads rows, writes dhidden, dweight, dbias
  // Reads rows.m and tangents, writes the tangents of loss, lse, z_loss, entropy to `out`.
  void (*jvp)(const LinearCrossEntropyProblem&);
  // Reads rows without log_l and entropy; the results are the gradients' tangents.
  void (*vjp_jvp)(const LinearCrossEntropyProblem&);
};
struct LinearCrossEntropyKernels {
  LinearCrossEntropyFunctions f32, f64;  // f32 also of 16 bits, widened
};

// The active target's functions. Where it has products of bf16 pairs and the rows consist of them,
// the forward pass and the VJP take these.
LinearCrossEntropyFunctions linear_cross_entropy_functions(
    const LinearCrossEntropyProblem& problem);

}  // namespace tilewise
