// Attention on the CPU: forward, VJP, JVP and the JVP of the VJP for float32 and float64. Plain
// C++; what the arguments mean is docs/ops/attention.md.
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

struct AttentionInputs {
  int64_t B = 0, H = 0, Hk = 0, N = 0, Nk = 0, D = 0, Dv = 0;
  View4 q, k, v;
  MaskView mask;
  View4 bias;                             // any strides; 0 along broadcast dims
  View4 slopes;                           // (B, H): batch and head strides
  View4 sinks;                            // (H): head stride
  double softmax_scale = 1, softcap = 0;  // softcap 0: none
  DropoutOptions dropout;
};

// Row results are contiguous (B, H, N); null where not wanted. m is in base 2.
struct AttentionResults {
  View4 o;
  void *m = nullptr, *log_l = nullptr, *lse = nullptr, *max_logit = nullptr, *entropy = nullptr;
};

// What a forward pass left for its derivatives. Row values are contiguous (B, H, N).
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

// One target's functions. They throw std::bad_alloc; nothing is promised of the outputs then.
template <class T>
struct AttentionFunctions {
  // with `tangents` the JVP beside the forward pass, else the last argument is not looked at
  void (*forward)(const AttentionInputs&, const AttentionResults&,
                  const AttentionTangents* tangents, const AttentionOutputTangents&);
  // the JVP of a forward pass that was made before
  void (*jvp)(const AttentionInputs&, const AttentionSaved&, const AttentionTangents&,
              const AttentionOutputTangents&);
  // the VJP; with `second` the JVP of the VJP, whose results are the tangents of the gradients
  void (*vjp)(const AttentionInputs&, const AttentionSaved&, const AttentionCotangents&,
              const AttentionSecond* second, const AttentionGradients&);
};
struct AttentionKernels {
  AttentionFunctions<float> f32;
  AttentionFunctions<double> f64;
  double (*fma_peak_f32)(double seconds);
  double (*fma_peak_f64)(double seconds);
};

const AttentionKernels& attention_kernels();  // of the active target

}  // namespace tilewise
