// Attention on the CPU: forward and VJP for float32 and float64. Plain C++; what the arguments mean
// is docs/ops/attention.md.
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

struct AttentionInputs {
  int64_t B = 0, H = 0, Hk = 0, N = 0, Nk = 0, D = 0, Dv = 0;
  View4 q, k, v;
  MaskView mask;
  View4 bias;                             // any strides; 0 along broadcast dims
  View4 slopes;                           // (B, H): batch and head strides
  View4 sinks;                            // (H): head stride
  double softmax_scale = 1, softcap = 0;  // softcap 0: none
};

// Row results are contiguous (B, H, N); null where not wanted. m is in base 2.
struct AttentionResults {
  View4 o;
  void *m = nullptr, *log_l = nullptr, *lse = nullptr, *max_logit = nullptr, *entropy = nullptr;
};

struct AttentionCotangents {
  View4 d_o, o;
  const void *m = nullptr, *log_l = nullptr, *dlse = nullptr;  // (B, H, N)
};

struct AttentionGradients {
  View4 dq, dk, dv;        // uninitialised
  View4 dbias;             // zeroed by the caller; strides 0 along dims that are summed over
  void* dsinks = nullptr;  // (H)
};

// One target's functions. They throw std::bad_alloc; nothing is promised of the outputs then.
struct AttentionKernels {
  void (*forward_f32)(const AttentionInputs&, const AttentionResults&);
  void (*forward_f64)(const AttentionInputs&, const AttentionResults&);
  void (*vjp_f32)(const AttentionInputs&, const AttentionCotangents&, const AttentionGradients&);
  void (*vjp_f64)(const AttentionInputs&, const AttentionCotangents&, const AttentionGradients&);
  double (*fma_peak_f32)(double seconds);
  double (*fma_peak_f64)(double seconds);
};

const AttentionKernels& attention_kernels();  // of the active target

}  // namespace tilewise
