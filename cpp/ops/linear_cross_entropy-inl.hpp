// Linear cross-entropy for one target: how a call is cut into blocks of tokens and classes, and
// their phases into tasks. Included once by each unit in ops/targets/.
#pragma once
#include "ops/linear_cross_entropy_phases-inl.hpp"

#include "simd/begin.hpp"

constexpr int64_t kStoredLogits = int64_t{72} << 20;  // bytes of logits kept until their gradient
constexpr int64_t kSpanClasses = 10 * kChainClasses;  // classes of a block
constexpr int64_t kMostTokens = 12 * kPanel;          // of a block, unless asked otherwise

enum class CrossEntropyKind { kForward, kVjp, kJvp, kVjpJvp };

// Cuts of a call. Blocks of tokens start at multiples of chains and blocks of classes too, so that
// cuts do not reach the bits.
struct Cuts {
  int64_t tokens, classes;
  bool stored;  // the logits of a block of tokens stay until all are known
};

template <class E>
Cuts cuts_of(const LinearCrossEntropyProblem& p, CrossEntropyKind kind) {
  using T = Acc<E>;
  auto whole = [](int64_t n, int64_t of) { return std::max<int64_t>(1, (n + of - 1) / of) * of; };
  const bool in_place = !p.dweight || p.dweight.storage == kStorageOf<T>;
  Cuts cuts;
  cuts.stored = kind == CrossEntropyKind::kForward && (p.dhidden || p.dweight || p.dbias) &&
                in_place && p.options.vocab_chunk == 0;
  const int64_t asked = p.options.vocab_chunk ? p.options.vocab_chunk : kSpanClasses;
  cuts.classes = std::min(whole(asked, kChainClasses), whole(p.V, kChainClasses));
  int64_t tokens = kMostTokens;
  if (cuts.stored)
    tokens = std::clamp<int64_t>(
        kStoredLogits / (p.V * static_cast<int64_t>(sizeof(T))) / kChainTokens * kChainTokens,
        kChainTokens, kMostTokens);
  if (p.options.token_chunk) tokens = whole(p.options.token_chunk, kChainTokens);
  cuts.tokens = std::min(tokens, whole(p.T, kPanel));
  return cuts;
}

template <class E>
class LinearCrossEntropy {
  using T = Acc<E>;

 public:
  LinearCrossEntropy(const LinearCrossEntropyProblem& problem, CrossEntropyKind kind)
      : p_(problem),
        kind_(kind),
        cuts_(cuts_of<E>(problem, kind)),
        threads_(threads_for(problem)),
        phases_(problem, cuts_.tokens, cuts_.classes, threads_, second()) {}

  void place(Arena& arena) {
    phases_.place(arena);
    const int64_t spans = cuts_.stored ? (p_.V + cuts_.classes - 1) / cuts_.classes : 1;
    span_size_ = phases_.logits_size();
    logits_ = arena.take<T>(spans * span_size_);
    tangents_ = arena.take<T>(moves() ? span_size_ : 0);
  }

  void run() {
    const FloatingPointMode mode;
    phases_.begin();
    TokenNumbers<T>& numbers = phases_.tokens();
    if (kind_ == CrossEntropyKind::kForward) {
      forward();
    } else {
      if (moves())
        tangent_pass();
      else
        numbers.take_saved();
      if (kind_ == CrossEntropyKind::kJvp) return numbers.write_tangents();
      numbers.take_cotangents(0, p_.T);
      if (second()) numbers.take_second();
    }
    if (!gradients()) return;
    if (!cuts_.stored) gradient_pass();
    phases_.finish();
  }

 private:
  bool gradients() const { return p_.dhidden || p_.dweight || p_.dbias; }
  bool second() const { return kind_ == CrossEntropyKind::kVjpJvp; }
  bool moves() const { return second() || kind_ == CrossEntropyKind::kJvp; }

  static int threads_for(const LinearCrossEntropyProblem& p) {
    const double work = double(p.T) * double(p.V) * double(std::max<int64_t>(p.C, 1));
    return static_cast<int>(std::clamp(work / double(1 << 22), 1.0, double(num_threads())));
  }

  template <class F>
  void each_tokens(const F& f) {
    for (int64_t t = 0; t < p_.T; t += cuts_.tokens)
      f(Tokens{t, static_cast<int>(std::min(cuts_.tokens, p_.T - t))});
  }
  template <class F>
  void each_span(const F& f) {
    for (int64_t v = 0; v < p_.V; v += cuts_.classes) {
      T* at = cuts_.stored ? logits_ + v / cuts_.classes * span_size_ : logits_;
      f(Span<T>{v, static_cast<int>(std::min(cuts_.classes, p_.V - v)), at, tangents_});
    }
  }

  void forward() {
    each_tokens([&](const Tokens& tokens) {
      if (phases_.tokens().of_all())
        phases_.choose_all_panels();
      else
        phases_.choose_panels(tokens, true);
      phases_.pack_tokens(tokens);
      each_span([&](const Span<T>& span) {
        phases_.logits(tokens, span);
        phases_.statistics(tokens, span);
      });
      phases_.tokens().write_results(tokens.first, tokens.count);
      phases_.tokens().take_cotangents(tokens.first, tokens.count);
      if (!cuts_.stored) return;
      phases_.choose_panels(tokens, false);
      each_span([&](const Span<T>& span) { phases_.gradients(tokens, span, false); });
    });
  }

  // Sums over classes that the tangents of results consist of.
  void tangent_pass() {
    phases_.tokens().take_maximum();
    each_tokens([&](const Tokens& tokens) {
      if (second())
        phases_.choose_panels(tokens, false);
      else
        phases_.choose_all_panels();
      phases_.pack_tokens(tokens);
      each_span([&](const Span<T>& span) {
        phases_.logits(tokens, span);
        phases_.tangent_logits(tokens, span);
        phases_.tangent_sums(tokens, span);
      });
    });
    phases_.tokens().finish_tangent_sums();
  }

  void gradient_pass() {
    each_span([&](const Span<T>& span) {
      each_tokens([&](const Tokens& tokens) {
        phases_.choose_panels(tokens, false);
        phases_.pack_tokens(tokens);
        phases_.logits(tokens, span);
        if (second()) phases_.tangent_logits(tokens, span);
        phases_.gradients(tokens, span, tokens.first + tokens.count == p_.T);
      });
    });
  }

  const LinearCrossEntropyProblem& p_;
  const CrossEntropyKind kind_;
  const Cuts cuts_;
  const int threads_;
  LinearCrossEntropyPhases<E> phases_;
  int64_t span_size_ = 0;
  T *logits_ = nullptr, *tangents_ = nullptr;
};

template <class E, CrossEntropyKind KIND>
void linear_cross_entropy_function(const LinearCrossEntropyProblem& problem) {
  LinearCrossEntropy<E> call(problem, KIND);
  Arena count(nullptr);
  call.place(count);
  const Buffer memory(count.used());
  Arena arena(memory.data());
  call.place(arena);
  call.run();
}

template <class E>
constexpr LinearCrossEntropyFunctions linear_cross_entropy_table() {
  return {linear_cross_entropy_function<E, CrossEntropyKind::kForward>,
          linear_cross_entropy_function<E, CrossEntropyKind::kVjp>,
          linear_cross_entropy_function<E, CrossEntropyKind::kJvp>,
          linear_cross_entropy_function<E, CrossEntropyKind::kVjpJvp>};
}

#if defined(TW_HAS_PAIRS)
inline const LinearCrossEntropyFunctions* linear_cross_entropy_pairs() {
  static const LinearCrossEntropyFunctions table{
      linear_cross_entropy_function<Bf16x2, CrossEntropyKind::kForward>,
      linear_cross_entropy_function<Bf16x2, CrossEntropyKind::kVjp>, nullptr, nullptr};
  return &table;
}
#else
inline const LinearCrossEntropyKernels* linear_cross_entropy_kernels() {
  static const LinearCrossEntropyKernels table{linear_cross_entropy_table<float>(),
                                               linear_cross_entropy_table<double>()};
  return &table;
}
#endif

#include "simd/end.hpp"
