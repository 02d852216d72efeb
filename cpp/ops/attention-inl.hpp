// Attention for one target: how a call is cut into tasks. Included once by each unit in
// ops/targets/.
#pragma once
#include <atomic>
#include <chrono>
#include <vector>

#include "ops/attention_decode-inl.hpp"
#include "ops/attention_jvp-inl.hpp"
#include "ops/attention_vjp_elements-inl.hpp"
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

// What one thread works on: the call, or of several sequences the one at hand.
template <class T>
class Current {
 public:
  AttentionProblem problem;
  explicit Current(const AttentionProblem& all) : problem(all), all_(all) {}

  // The number that batch b has in `problem`.
  int64_t select(int64_t b) {
    if (!all_.in.sequences) return b;
    if (b != now_) problem = all_.sequence(b, sizeof(T));
    now_ = b;
    return 0;
  }

 private:
  const AttentionProblem& all_;
  int64_t now_ = -1;
};

// How many query heads of a group work on a tile of keys together: those of short queries do, which
// would read it once for each head, as long as every thread has work.
template <class Body>
int shared_heads(const AttentionInputs& in) {
  const int64_t group = in.H / in.Hk;
  if (!Body::kSharesKeys || in.N > kPanel || in.mask.head != 0) return 1;
  int64_t heads = std::min<int64_t>(group, kMaxBlock / kPanel);
  while (heads > 1 && (group % heads != 0 || in.B * in.H / heads < num_threads())) heads--;
  return static_cast<int>(heads);
}

// A body works on blocks of queries; the blocks are dealt to the threads.
template <class Body>
void by_query_blocks(const AttentionProblem& all, bool moves) {
  using T = typename Body::Element;
  const AttentionInputs& in = all.in;
  const int64_t panel_bytes =
      Body::block_columns(in, moves) * kPanel * static_cast<int64_t>(sizeof(T));
  const int64_t wanted = (in.N + kPanel - 1) / kPanel;
  int64_t panels = std::clamp<int64_t>(kBlockBytes / panel_bytes, 1,
                                       std::min<int64_t>(kMaxBlock / kPanel, wanted));
  const int threads = threads_for(in, in.B * in.H * wanted);
  while (panels > 2 && threads > 1 && in.B * in.H * ((wanted + panels - 1) / panels) < 4 * threads)
    panels = (panels + 1) / 2;
  const int64_t rows = panels * kPanel, blocks = (in.N + rows - 1) / rows;
  const int heads = shared_heads<Body>(in);
  const int64_t tasks = in.B * in.H / heads * blocks;
  std::atomic<int64_t> next{0};
  run_parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int) {
    Current<T> current(all);
    Body body(current.problem, std::max(static_cast<int>(panels), heads), moves);
    placed(body);
    MaskBlock mask;
    const FloatingPointMode mode;
    for (int64_t t; (t = next.fetch_add(1)) < tasks;) {
      // last rows first: under a causal mask they take longest
      auto first_row = [&](int64_t task) { return (blocks - 1 - task % blocks) * rows; };
      const int64_t q0 = first_row(t), bh = t / blocks * heads;
      const int64_t b = current.select(bh / in.H), N = current.problem.in.N;
      if constexpr (Body::kSharesKeys)
        if (const int64_t after = t + threads; after < tasks && !in.sequences) {
          const int64_t head = after / blocks * heads, first = first_row(after);
          body.expect(head / in.H, head % in.H, first, std::min(rows, N - first));
        }
      if (q0 < N) body.run(b, bh % in.H, heads, q0, static_cast<int>(std::min(rows, N - q0)), mask);
    }
  });
}

template <class E>
void forward_decode(const AttentionProblem& all) {
  using T = Acc<E>;
  const AttentionInputs& in = all.in;
  auto chunks_of = [](int64_t keys) {
    return std::max<int64_t>(1, (keys + kChunkKeys - 1) / kChunkKeys);
  };
  const int64_t chunks = chunks_of(in.Nk), heads = in.B * in.Hk;
  const int64_t size = DecodeBody<E>::state_size(in);
  std::vector<T> states(static_cast<size_t>(heads * chunks * size + kGroup));
  std::vector<std::atomic<int64_t>> left(static_cast<size_t>(heads));
  for (auto& l : left) l = chunks;
  std::atomic<int64_t> next{0};
  run_parallel(threads_for(in, heads * chunks), [&](int) {
    Current<T> current(all);
    DecodeBody<E> body(current.problem);
    placed(body);
    const FloatingPointMode mode;
    for (int64_t t; (t = next.fetch_add(1)) < heads * chunks;) {
      const int64_t head = t / chunks, hk = head % in.Hk, b = current.select(head / in.Hk);
      const int64_t mine = chunks_of(current.problem.in.Nk);
      if (t % chunks < mine) body.chunk(b, hk, t % chunks, states.data() + t * size);
      if (left[static_cast<size_t>(head)].fetch_sub(1) == 1)
        body.finish(b, hk, states.data() + head * chunks * size, mine);
    }
  });
}

template <class E>
void forward(const AttentionProblem& all) {
  if (all.in.B * all.in.H * all.in.N == 0) return;
  if (all.in.N <= kDecodeQueries && !kTiled<E>)
    forward_decode<E>(all);
  else
    by_query_blocks<ForwardBody<E>>(all, false);
}

template <class E>
void forward_jvp(const AttentionProblem& all) {
  if (all.in.B * all.in.H * all.in.N > 0) by_query_blocks<ForwardBody<E>>(all, true);
}

template <class E>
void jvp(const AttentionProblem& all) {
  if (all.in.B * all.in.H * all.in.N > 0) by_query_blocks<JvpBody<E>>(all, true);
}

TW_INLINE BiasGradient bias_gradient(const View4& dbias) {
  if (!dbias) return BiasGradient::kNone;
  if (dbias.row) return dbias.column ? BiasGradient::kFull : BiasGradient::kOverKeys;
  return dbias.column ? BiasGradient::kOverQueries : BiasGradient::kOverBoth;
}

TW_INLINE void clear_rows(const View4& x, const AttentionInputs& in, int64_t columns) {
  if (!x) return;
  for (int64_t b = 0; b < in.B; b++)
    for (int64_t h = 0; h < in.Hk; h++)
      for (int64_t r = 0; r < in.Nk; r++)
        std::memset(const_cast<char*>(row_bytes(x, b, h, r)), 0,
                    static_cast<size_t>(columns * bytes_of(x.storage)));
}

template <class E>
void gradients(const AttentionProblem& all, bool moves);

// A bias that is one number a head: its gradient by key, then the sum over keys in ascending order.
template <class E>
void gradients_over_both(AttentionProblem all, bool moves) {
  using T = Acc<E>;
  const AttentionInputs& in = all.in;
  const View4 to = all.gradients.dbias;
  const int64_t batches = to.batch ? in.B : 1, heads = to.head ? in.H : 1;
  std::vector<T> by_key(static_cast<size_t>(batches * heads * in.Nk));
  View4 sums{by_key.data(), to.batch ? heads * in.Nk : 0, to.head ? in.Nk : 0, 0, 1};
  sums.storage = to.storage;
  all.gradients.dbias = sums;
  gradients<E>(all, moves);
  const FloatingPointMode mode;
  for (int64_t b = 0; b < batches; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t k = 0; k < in.Nk; k++)
        *to.at_mut<T>(b, h) += by_key[static_cast<size_t>((b * heads + h) * in.Nk + k)];
}

// Room for the sums of a gradient whose rows are stored in fewer bits than they are summed in;
// `batches` and `rows` are those of its array.
template <class T>
View4 sums_of(const View4& x, int64_t batches, int64_t Hk, int64_t rows, int64_t columns,
              std::vector<T>* memory) {
  if (!x || in_place<T>(x)) return {};
  memory->resize(static_cast<size_t>(batches * Hk * rows * columns));
  View4 sums{memory->data(), Hk * rows * columns, rows * columns, columns, 1};
  sums.storage = kStorage<T>;
  return sums;
}

// The VJP; where it `moves`, the JVP of the VJP.
template <class E>
void gradients(const AttentionProblem& problem, bool moves) {
  using T = Acc<E>;
  AttentionProblem all = problem;
  const AttentionInputs& in = all.in;
  AttentionGradients& grads = all.gradients;
  const Sequences& sequences = in.sequences;
  if (in.B * in.Hk == 0) return;
  if (bias_gradient(grads.dbias) == BiasGradient::kOverBoth && in.Nk > 1 && in.N > 0)
    return gradients_over_both<E>(all, moves);
  if (in.N == 0) {
    Current<T> current(all);
    for (int64_t s = 0; s < (sequences ? in.B : 1); s++) {
      current.select(s);
      clear_rows(current.problem.gradients.dk, current.problem.in, in.D);
      clear_rows(current.problem.gradients.dv, current.problem.in, in.Dv);
    }
    if (grads.dsinks) std::memset(grads.dsinks, 0, sizeof(T) * static_cast<size_t>(in.H));
    return;
  }
  const bool across_batches = grads.dbias && grads.dbias.batch == 0 && in.B > 1 && !sequences;
  const bool across_heads = grads.dbias && grads.dbias.head == 0 && in.H > 1;
  const int64_t unit_batches = across_batches ? in.B : 1, unit_groups = across_heads ? in.Hk : 1;
  const int64_t query_chunks = (in.N + kGradChunk - 1) / kGradChunk;
  const int64_t units = in.B / unit_batches * (in.Hk / unit_groups);
  const int64_t units_across = in.Hk / unit_groups,
                batch_steps = unit_groups * (in.H / in.Hk) * query_chunks;
  const int64_t steps = unit_batches * batch_steps;
  const int threads = threads_for(in, units * steps);
  std::vector<T> dk_memory, dv_memory;
  if (in.H / in.Hk * query_chunks > 1) {
    const int64_t batches = sequences.k_starts ? 1 : in.B,
                  rows = sequences.k_starts ? sequences.k_starts[in.B] : in.Nk;
    grads.dk_sum = sums_of<T>(grads.dk, batches, in.Hk, rows, in.D, &dk_memory);
    grads.dv_sum = sums_of<T>(grads.dv, batches, in.Hk, rows, in.Dv, &dv_memory);
  }
  VjpSchedule schedule(units, steps, (in.Nk + kGradChunk - 1) / kGradChunk, threads);
  schedule.bias = bias_gradient(grads.dbias);
  schedule.bias_shared = across_batches || across_heads;
  schedule.unit_groups = unit_groups;
  schedule.query_chunks = query_chunks;
  const bool corrected = kPairs<E> && grads.dsinks;
  if (corrected) schedule.sink_errors.resize(static_cast<size_t>(units * steps));
  const bool pairs = grads.dq || grads.dk || grads.dv || grads.dbias || corrected;
  std::atomic<int64_t> next_head{0};
  run_parallel(threads, [&](int) {
    Current<T> current(all);
    VjpBody<E> body(current.problem, moves, schedule);
    placed(body);
    const FloatingPointMode mode;
    for (int64_t unit, step; pairs && schedule.take(&unit, &step);) {
      const int64_t b = unit / units_across * unit_batches + step / batch_steps;
      body.run(unit, step, current.select(b));
    }
    if (!grads.dsinks) return;
    for (int64_t h; (h = next_head.fetch_add(1)) < in.H;) {
      T total = 0;
      for (int64_t s = 0; s < (sequences ? in.B : 1); s++) {
        current.select(s);
        total = body.sink_gradient(h, total);
      }
      static_cast<T*>(grads.dsinks)[h] = total + T{0};
    }
  });
  for (int64_t i = 0; i < std::ssize(schedule.sink_errors); i++) {
    const int64_t head = VjpBody<E>::head_of(schedule, in, i / steps, i % steps);
    static_cast<T*>(grads.dsinks)[head] +=
        static_cast<T>(schedule.sink_errors[static_cast<size_t>(i)]);
  }
}

template <class E>
void vjp(const AttentionProblem& all) {
  gradients<E>(all, false);
}

template <class E>
void vjp_jvp(const AttentionProblem& all) {
  gradients<E>(all, true);
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

template <class E>
inline const AttentionFunctions* functions() {
  static const AttentionFunctions table{forward<E>, forward_jvp<E>, jvp<E>, vjp<E>, vjp_jvp<E>};
  return &table;
}

// The two that take pairs of bf16.
template <class E>
inline const AttentionFunctions* pair_functions() {
  static const AttentionFunctions table{forward<E>, nullptr, nullptr, vjp<E>, nullptr};
  return &table;
}

inline const AttentionKernels* kernels() {
  static const AttentionKernels table{*functions<float>(), *functions<double>(), fma_peak<float>,
                                      fma_peak<double>};
  return &table;
}

#include "simd/end.hpp"
