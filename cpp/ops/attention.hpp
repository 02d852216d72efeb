// Attention on the CPU: forward, VJP, JVP and the JVP of the VJP. Plain C++; what the arguments
// mean is docs/ops/attention.md.
#pragma once
#include <cstdint>

#include "runtime/views.hpp"

namespace tilewise {

// Which keys a query sees: nothing set = all. Strides are 0 where the mask is the same for all
// batches or heads.
struct MaskView {
  const int32_t* rows = nullptr;   // two intervals [lo, hi) a row: (.., N, 4)
  const uint16_t* bits = nullptr;  // bit i % 16 of word (j, i / 16): (.., Nk, ceil(N / 16))
  const uint8_t* tiles = nullptr;  // 0 empty, 1 partial, 2 full: (.., ceil(N / 16), ceil(Nk / 64))
  int64_t batch = 0, head = 0;     // strides of rows or bits
  int64_t tile_batch = 0, tile_head = 0;
};

// A probability is dropped where its random word is below the threshold, else multiplied by `kept`.
struct DropoutOptions {
  bool on = false;
  uint32_t threshold = 0;
  double kept = 1;
  uint64_t seed = 0;
};

// Sequences of different lengths in one call. Each is computed as a call of its own.
struct Sequences {
  // packed: of sequence s, rows [starts[s], starts[s + 1]) of the only batch
  const int64_t *q_starts = nullptr, *k_starts = nullptr;
  // cached: keys in pages; row s of the block table and the length of sequence s
  const int32_t* block_table = nullptr;
  int64_t block_columns = 0;
  const int64_t* k_lengths = nullptr;

  explicit operator bool() const { return q_starts || k_lengths; }
};

struct AttentionInputs {
  // of sequences, N and Nk are the longest and B is their number
  int64_t B = 0, H = 0, Hk = 0, N = 0, Nk = 0, D = 0, Dv = 0;
  View4 q, k, v;
  MaskView mask;
  View4 bias;                             // any strides; 0 along broadcast dims
  View4 slopes;                           // (B, H): batch and head strides
  View4 sinks;                            // (H): head stride
  double softmax_scale = 1, softcap = 0;  // softcap 0: none
  DropoutOptions dropout;
  int64_t row_batch = 0, row_head = 0;  // strides of what has one number a row, (B, H, N)
  int64_t first_batch = 0;              // number of the first batch, for dropout
  Sequences sequences;

  int64_t row_at(int64_t b, int64_t h, int64_t i) const { return b * row_batch + h * row_head + i; }
};

// Row results are null where not wanted. m is in base 2. Of 16 bits, o may be wanted in float32
// besides.
struct AttentionResults {
  View4 o, o_full;
  void *m = nullptr, *log_l = nullptr, *lse = nullptr, *max_logit = nullptr, *entropy = nullptr;
};

// What a forward pass left for its derivatives.
struct AttentionSaved {
  View4 o;
  const void *m = nullptr, *log_l = nullptr;
};

struct AttentionCotangents {
  View4 d_o;
  const void* dlse = nullptr;  // (B, H, N); null for zero
};

struct AttentionGradients {  // null where not wanted
  View4 dq, dk, dv;          // uninitialised
  View4 dk_sum, dv_sum;      // scratch of the accumulators' type, where dk and dv have another
  View4 dbias;               // zeroed by the caller; strides 0 along dims that are summed over
  void* dsinks = nullptr;    // (H)
};

struct AttentionTangents {  // null for zero
  View4 tq, tk, tv;
  View4 tbias;                   // strides as those of the bias
  const void* tsinks = nullptr;  // (H)
};

struct AttentionOutputTangents {
  View4 to;
  void* tlse = nullptr;  // (B, H, N)
};

// What the JVP of the VJP takes besides: tangents of the inputs, of the outputs, and of the
// cotangents (null for zero).
struct AttentionSecond {
  AttentionTangents inputs;
  AttentionOutputTangents outputs;
  View4 tdo;
  const void* tdlse = nullptr;  // (B, H, N)
};

// Everything that a function may read or write.
struct AttentionProblem {
  AttentionInputs in;
  AttentionResults out;
  AttentionSaved saved;
  AttentionCotangents cotangents;
  AttentionGradients gradients;
  AttentionTangents tangents;
  AttentionOutputTangents moved;
  AttentionSecond second;

  // The call that sequence s would be on its own. `element` is the size of a row's number.
  AttentionProblem sequence(int64_t s, int64_t element) const;
};

// One target's functions. They throw std::bad_alloc; nothing is promised of the outputs then.
struct AttentionFunctions {
  void (*forward)(const AttentionProblem&);
  void (*forward_jvp)(const AttentionProblem&);  // the JVP beside the forward pass
  void (*jvp)(const AttentionProblem&);          // of a forward pass that was made before
  void (*vjp)(const AttentionProblem&);
  void (*vjp_jvp)(const AttentionProblem&);  // the results are the tangents of the gradients
};
struct AttentionKernels {
  AttentionFunctions f32;  // also of 16 bits, widened
  AttentionFunctions f64;
  double (*fma_peak_f32)(double seconds);
  double (*fma_peak_f64)(double seconds);
};

const AttentionKernels& attention_kernels();  // of the active target

// The active target's functions for the call. Where it has products of bf16 pairs and the rows
// consist of them, or of whole tiles of them, the forward pass and the VJP take these. Tangents do
// not: the sum of p ts less mu o cancels, and would leave the rounding of p ts to bf16.
AttentionFunctions attention_functions(const AttentionInputs& in);

}  // namespace tilewise
