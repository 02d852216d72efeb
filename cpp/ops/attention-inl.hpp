// Attention for one target: how a call is cut into tasks. Included once by each unit in
// ops/targets/.
#pragma once
#include <atomic>
#include <chrono>
#include <vector>

#include "ops/attention_decode-inl.hpp"
#include "ops/attention_jvp-inl.hpp"
#include "ops/attention_vjp-inl.hpp"
#include "runtime/thread_pool.hpp"

#include "simd/begin.hpp"

constexpr int64_t kDecodeQueries = 8;  // up to this many queries a head, keys go into the lanes
constexpr int64_t kBlockBytes =
    600 << 10;  // packed q and o of a query block, meant to stay in the second-level cache
constexpr double kPairsWorthAThread =
    2 << 14;  // query-key pairs times columns / 64 below which waking a thread costs more

TW_INLINE int threads_for(const AttentionInputs& in, int64_t tasks) {
  const double pairs =
      double(in.B) * double(in.H) * double(in.N) * double(in.Nk) * double(in.D + in.Dv) / 128;
  const double most = std::max(1.0, std::min(double(tasks), pairs / kPairsWorthAThread));
  return std::min(num_threads(), static_cast<int>(std::min(most, 1e6)));
}

template <class Body>
Body& placed(Body& body) {
  Arena count(nullptr);
  body.place(count);
  Arena arena(workspace(count.used()));
  body.place(arena);
  return body;
}

// A body works on blocks of queries of one head; the blocks are dealt to the threads.
template <class Body, class... Args>
void by_query_blocks(const AttentionInputs& in, const Args&... args) {
  using T = typename Body::Element;
  const int64_t panel_bytes =
      Body::block_columns(in, args...) * kPanel * static_cast<int64_t>(sizeof(T));
  const int64_t wanted = (in.N + kPanel - 1) / kPanel;
  int64_t panels = std::clamp<int64_t>(kBlockBytes / panel_bytes, 1,
                                       std::min<int64_t>(kMaxBlock / kPanel, wanted));
  const int all = threads_for(in, in.B * in.H * wanted);
  while (panels > 2 && all > 1 && in.B * in.H * ((wanted + panels - 1) / panels) < 4 * all)
    panels = (panels + 1) / 2;
  const int64_t rows = panels * kPanel, blocks = (in.N + rows - 1) / rows,
                tasks = in.B * in.H * blocks;
  std::atomic<int64_t> next{0};
  run_parallel(static_cast<int>(std::min<int64_t>(all, tasks)), [&](int) {
    Body body(in, args..., static_cast<int>(panels));
    placed(body);
    MaskBlock mask;
    const FloatingPointMode mode;
    for (int64_t t; (t = next.fetch_add(1)) < tasks;) {
      // last rows first: under a causal mask they take longest
      const int64_t q0 = (blocks - 1 - t % blocks) * rows, bh = t / blocks;
      body.run(bh / in.H, bh % in.H, q0, static_cast<int>(std::min(rows, in.N - q0)), mask);
    }
  });
}

template <class T>
void forward_decode(const AttentionInputs& in, const AttentionResults& out) {
  const int64_t chunks = std::max<int64_t>(1, (in.Nk + kChunkKeys - 1) / kChunkKeys),
                heads = in.B * in.Hk;
  const int64_t size = DecodeBody<T>::state_size(in);
  std::vector<T> states(static_cast<size_t>(heads * chunks * size + kGroup));
  std::vector<std::atomic<int64_t>> left(static_cast<size_t>(heads));
  for (auto& l : left) l = chunks;
  std::atomic<int64_t> next{0};
  run_parallel(threads_for(in, heads * chunks), [&](int) {
    DecodeBody<T> body(in, out);
    placed(body);
    const FloatingPointMode mode;
    for (int64_t t; (t = next.fetch_add(1)) < heads * chunks;) {
      const int64_t head = t / chunks, b = head / in.Hk, hk = head % in.Hk;
      body.chunk(b, hk, t % chunks, states.data() + t * size);
      if (left[static_cast<size_t>(head)].fetch_sub(1) == 1)
        body.finish(b, hk, states.data() + head * chunks * size, chunks);
    }
  });
}

template <class T>
void forward(const AttentionInputs& in, const AttentionResults& out,
             const AttentionTangents* tangents, const AttentionOutputTangents& out_tangents) {
  if (in.B * in.H * in.N == 0) return;
  if (in.N <= kDecodeQueries && !tangents)
    forward_decode<T>(in, out);
  else
    by_query_blocks<ForwardBody<T>>(in, out, tangents, out_tangents);
}

template <class T>
void jvp(const AttentionInputs& in, const AttentionSaved& saved, const AttentionTangents& tangents,
         const AttentionOutputTangents& out) {
  if (in.B * in.H * in.N > 0) by_query_blocks<JvpBody<T>>(in, saved, tangents, out);
}

TW_INLINE BiasGradient bias_gradient(const View4& dbias) {
  if (!dbias) return BiasGradient::kNone;
  if (dbias.row) return dbias.column ? BiasGradient::kFull : BiasGradient::kOverKeys;
  return dbias.column ? BiasGradient::kOverQueries : BiasGradient::kOverBoth;
}

template <class T>
void clear_rows(const View4& x, int64_t B, int64_t H, int64_t rows, int64_t columns) {
  if (!x) return;
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t r = 0; r < rows; r++)
        std::memset(x.at_mut<T>(b, h, r), 0, sizeof(T) * static_cast<size_t>(columns));
}

template <class T>
void vjp(const AttentionInputs& in, const AttentionSaved& saved, const AttentionCotangents& ct,
         const AttentionSecond* second, const AttentionGradients& grads);

// A bias that is one number a head: its gradient by key, then the sum over keys in ascending order.
template <class T>
void vjp_over_both(const AttentionInputs& in, const AttentionSaved& saved,
                   const AttentionCotangents& ct, const AttentionSecond* second,
                   AttentionGradients grads) {
  const View4 to = grads.dbias;
  const int64_t batches = to.batch ? in.B : 1, heads = to.head ? in.H : 1;
  std::vector<T> by_key(static_cast<size_t>(batches * heads * in.Nk));
  grads.dbias = {by_key.data(), to.batch ? heads * in.Nk : 0, to.head ? in.Nk : 0, 0, 1};
  vjp<T>(in, saved, ct, second, grads);
  const FloatingPointMode mode;
  for (int64_t b = 0; b < batches; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t k = 0; k < in.Nk; k++)
        *to.at_mut<T>(b, h) += by_key[static_cast<size_t>((b * heads + h) * in.Nk + k)];
}

template <class T>
void vjp(const AttentionInputs& in, const AttentionSaved& saved, const AttentionCotangents& ct,
         const AttentionSecond* second, const AttentionGradients& grads) {
  if (in.B * in.Hk == 0) return;
  if (bias_gradient(grads.dbias) == BiasGradient::kOverBoth && in.Nk > 1)
    return vjp_over_both<T>(in, saved, ct, second, grads);
  if (in.N == 0) {
    clear_rows<T>(grads.dk, in.B, in.Hk, in.Nk, in.D);
    clear_rows<T>(grads.dv, in.B, in.Hk, in.Nk, in.Dv);
    if (grads.dsinks) std::memset(grads.dsinks, 0, sizeof(T) * static_cast<size_t>(in.H));
    return;
  }
  const bool across_batches = grads.dbias && grads.dbias.batch == 0 && in.B > 1;
  const bool across_heads = grads.dbias && grads.dbias.head == 0 && in.H > 1;
  const int64_t unit_batches = across_batches ? in.B : 1, unit_groups = across_heads ? in.Hk : 1;
  const int64_t query_chunks = (in.N + kGradChunk - 1) / kGradChunk;
  const int64_t units = in.B / unit_batches * (in.Hk / unit_groups);
  const int64_t steps = unit_batches * unit_groups * (in.H / in.Hk) * query_chunks;
  const int threads = threads_for(in, units * steps);
  VjpSchedule schedule(units, steps, (in.Nk + kGradChunk - 1) / kGradChunk, threads);
  schedule.bias = bias_gradient(grads.dbias);
  schedule.bias_shared = across_batches || across_heads;
  schedule.unit_batches = unit_batches;
  schedule.unit_groups = unit_groups;
  schedule.query_chunks = query_chunks;
  const bool pairs = grads.dq || grads.dk || grads.dv || grads.dbias;
  std::atomic<int64_t> next_head{0};
  run_parallel(threads, [&](int) {
    VjpBody<T> body(in, saved, ct, second, grads, schedule);
    placed(body);
    const FloatingPointMode mode;
    for (int64_t unit, step; pairs && schedule.take(&unit, &step);) body.run(unit, step);
    if (grads.dsinks)
      for (int64_t h; (h = next_head.fetch_add(1)) < in.H;) body.sink_gradient(h);
  });
}

// Fused multiply-adds of one core in GFLOP/s: independent chains in registers.
template <class T>
TW_NOINLINE double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int kChains = 12, kRounds = 4096;
  Vec<T> acc[kChains];
  for (int i = 0; i < kChains; i++) acc[i] = splat<T>(i);
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto begin = Clock::now();
    for (int r = 0; r < kRounds; r++)
      TW_UNROLL for (int i = 0; i < kChains; i++) acc[i] = fma(acc[i], splat<T>(0.5), splat<T>(1));
    const double took = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::max(best, 2.0 * kChains * kRounds * kWidth<T> / took * 1e-9);
    for (int i = 0; i < kChains; i++) asm volatile("" : "+m"(acc[i]));
  } while (Clock::now() < end);
  return best;
}

inline const AttentionKernels* kernels() {
  static const AttentionKernels table{{forward<float>, jvp<float>, vjp<float>},
                                      {forward<double>, jvp<double>, vjp<double>},
                                      fma_peak<float>,
                                      fma_peak<double>};
  return &table;
}

#include "simd/end.hpp"
