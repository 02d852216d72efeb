// What is done with a block of tokens and classes: logits, statistics, gradients, each by all
// threads. A task owns what it writes, so no sum is ever made of threads' parts.
#pragma once
#include <atomic>

#include "ops/linear_cross_entropy_tokens-inl.hpp"
#include "runtime/thread_pool.hpp"
#include "tile/gemm-inl.hpp"

#include "simd/begin.hpp"

constexpr int kTileClasses = kChainClasses;  // classes of a task
constexpr int kTileBits = kTileClasses / kFilledClasses;
static_assert(kTileBits <= 16 && kTileClasses % kFilledClasses == 0);

struct Tokens {
  int64_t first;
  int count;
  int panels() const { return (count + kPanel - 1) / kPanel; }
};
// Classes [first, first + count) and their logits: [panel][row of the span][lane].
template <class T>
struct Span {
  int64_t first;
  int count;
  T *s, *ts;
};

template <class F>
void each_task(int threads, int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  run_parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int slot) {
    const FloatingPointMode mode;
    for (int64_t t; (t = next.fetch_add(1)) < tasks;) f(slot, t);
  });
}

TW_INLINE const char* row_of(const Matrix& x, int64_t r) {
  return static_cast<const char*>(x.data) + r * x.row * bytes_of(x.storage);
}

template <class E>
class LinearCrossEntropyPhases {
  using T = Acc<E>;
  using X = std::conditional_t<kPairs<E>, Bf16, T>;  // of rows that products are made of
  static constexpr int kW = kGradWidth<E>;

  // Rows of tokens as the products take them.
  struct PackedTokens {
    X* rows = nullptr;
    E *lanes = nullptr, *blocks = nullptr;
  };
  // A product's gradient and the rows that it multiplies.
  struct Term {
    const T* s;
    const Matrix* weight;
    const PackedTokens* hidden;
  };

 public:
  LinearCrossEntropyPhases(const LinearCrossEntropyProblem& problem, int64_t tokens,
                           int64_t classes, int threads, bool second)
      : p_(problem),
        threads_(threads),
        second_(second),
        elements_((problem.C + kFold<E> - 1) / kFold<E>),
        blocks_((problem.C + kW - 1) / kW),
        panels_(static_cast<int>((tokens + kPanel - 1) / kPanel)),
        classes_(classes),
        tokens_(problem) {}

  int64_t logits_size() const { return panels_ * classes_ * kPanel; }

  void place(Arena& arena) {
    tokens_.place(arena);
    place_packed(arena, &hidden_, true);
    place_packed(arena, &thidden_, bool(p_.thidden));
    bias_ = arena.take<T>(own(p_.bias) ? 0 : p_.V);
    tbias_ = arena.take<T>(own(p_.tbias) ? 0 : p_.V);
    for (int part = 0; part < parts_of(p_.dweight); part++)
      weight_image_[part] = arena.take<E>(logits_size() / kFold<E>);
    for (int part = 0; part < parts_of(p_.dhidden); part++)
      hidden_image_[part] = arena.take<E>(logits_size() / kFold<E>);
    dhidden_ = arena.take<T>(own(p_.dhidden) ? 0 : p_.T * p_.C);
    const bool rounded = kPairs<E> && p_.dhidden && parts_of(p_.dhidden) == 1;
    lost_ = arena.take<T>(rounded ? p_.T * p_.C : 0);
    if (!rounded) lost_ = nullptr;
    dweight_ = arena.take<T>(own(p_.dweight) ? 0 : classes_ * p_.C);
    dbias_ = arena.take<T>(own(p_.dbias) ? 0 : p_.V);
    const bool filter = p_.options.gradient_filter > 0;
    filled_ = arena.take<uint16_t>(filter ? panels_ * classes_ / kTileClasses : 0);
    if (!filter) filled_ = nullptr;
    scratch_size_ = (kTileClasses * elements_ + kChainClasses * kW + 63) / 64 * 64;
    scratch_ = arena.take<E>(threads_ * scratch_size_);
    chosen_ = arena.take<bool>(panels_);
  }

  void begin() {
    tokens_.begin();
    if (p_.bias && !own(p_.bias)) convert_numbers(p_.bias, bias_);
    if (p_.tbias && !own(p_.tbias)) convert_numbers(p_.tbias, tbias_);
    if (own(p_.bias)) bias_ = const_cast<T*>(static_cast<const T*>(p_.bias.data));
    if (own(p_.tbias)) tbias_ = const_cast<T*>(static_cast<const T*>(p_.tbias.data));
    if (own(p_.dhidden)) dhidden_ = data(p_.dhidden);
    if (own(p_.dbias)) dbias_ = data(p_.dbias);
    if (p_.dbias) std::memset(dbias_, 0, sizeof(T) * static_cast<size_t>(p_.V));
    if (!p_.dhidden) return;
    if (lost_) std::memset(lost_, 0, sizeof(T) * static_cast<size_t>(p_.T * p_.C));
    for (int64_t t = 0; t < p_.T; t++)
      std::memset(dhidden_ + t * dhidden_ld(), 0, sizeof(T) * static_cast<size_t>(p_.C));
  }

  TokenNumbers<T>& tokens() { return tokens_; }

  // Panels of which no token is wanted are left out: `kept` asks for tokens with a loss, else for
  // those that some gradient comes from.
  void choose_panels(const Tokens& tokens, bool kept) {
    for (int p = 0; p < tokens.panels(); p++)
      chosen_[p] = tokens_.any(tokens.first + p * kPanel, kept);
  }
  void choose_all_panels() { std::memset(chosen_, 1, static_cast<size_t>(panels_)); }

  void pack_tokens(const Tokens& tokens) {
    each_task(threads_, 2 * tokens.panels(), [&](int, int64_t task) {
      const int panel = static_cast<int>(task / 2);
      if (!chosen_[panel]) return;
      if (task % 2 == 0) pack_panel(p_.hidden, tokens, panel, &hidden_);
      if (task % 2 == 1 && p_.thidden) pack_panel(p_.thidden, tokens, panel, &thidden_);
    });
  }

  // Logits of the block, before the soft cap.
  void logits(const Tokens& tokens, const Span<T>& span) {
    each_tile(span, [&](int slot, int first, int count) {
      const Rows<E> rows = weight_rows(p_.weight, span.first + first, count, scratch(slot));
      add_products(rows, hidden_, tokens, first, count, true, span.s);
      const T* bias = bias_ + span.first + first;
      if (p_.bias)
        each_panel(tokens, [&](int p) { add_bias_of<T>(at(span.s, p, first), count, bias); });
    });
  }

  // ts of the block.
  void tangent_logits(const Tokens& tokens, const Span<T>& span) {
    each_tile(span, [&](int slot, int first, int count) {
      const int64_t v = span.first + first;
      if (p_.thidden)
        add_products(weight_rows(p_.weight, v, count, scratch(slot)), thidden_, tokens, first,
                     count, true, span.ts);
      if (p_.tweight)
        add_products(weight_rows(p_.tweight, v, count, scratch(slot)), hidden_, tokens, first,
                     count, !p_.thidden, span.ts);
      const T cap = tokens_.form().cap;
      each_panel(tokens, [&](int p) {
        T* ts = at(span.ts, p, first);
        if (!p_.thidden && !p_.tweight)
          std::memset(ts, 0, sizeof(T) * static_cast<size_t>(count * kPanel));
        if (p_.tbias) add_bias_of<T>(ts, count, tbias_ + v);
        if (cap != 0) cap_tangents<T>(at(span.s, p, first), count, cap, ts);
      });
    });
  }

  void statistics(const Tokens& tokens, const Span<T>& span) {
    each_task(threads_, tokens.panels(), [&](int, int64_t p) {
      if (!chosen_[p]) return;
      for (int i = 0; i < span.count; i += kFoldClasses) {
        const int n = std::min(kFoldClasses, span.count - i);
        tokens_.add_fold(tile(span.s, tokens, span, static_cast<int>(p), i, n));
      }
    });
  }

  void tangent_sums(const Tokens& tokens, const Span<T>& span) {
    each_task(threads_, tokens.panels(), [&](int, int64_t p) {
      if (!chosen_[p]) return;
      for (int i = 0; i < span.count; i += kFoldClasses) {
        const int n = std::min(kFoldClasses, span.count - i), panel = static_cast<int>(p);
        add_tangent_sums<T>(tile(span.s, tokens, span, panel, i, n), at(span.ts, panel, i),
                            tokens_.form().cap, tokens_.lanes());
      }
    });
  }

  // Turns s into dz and adds what it gives; `last` of the blocks that dweight's rows are made of.
  void gradients(const Tokens& tokens, const Span<T>& span, bool last) {
    each_tile(span, [&](int, int first, int count) {
      each_panel(tokens, [&](int p) { put_tile(tokens, span, p, first, count); });
      if (p_.dbias) add_bias_gradient(tokens, span, first, count);
      if (p_.dweight) add_weight_tile(tokens, span, first, count, last);
    });
    if (!p_.dhidden || blocks_ == 0) return;
    // Of few columns, groups of panels are tasks of their own.
    const int64_t groups = std::min<int64_t>((threads_ + blocks_ - 1) / blocks_, tokens.panels());
    each_task(threads_, blocks_ * groups, [&](int slot, int64_t task) {
      each_term(span, [&](const Term& term) {
        add_hidden_block(term, tokens, span, slot, task / groups, task % groups, groups);
      });
    });
#if defined(TW_HAS_PAIRS)
    if constexpr (kPairs<E>)
      if (lost_)
        each_task(threads_, tokens.panels(), [&](int, int64_t p) {
          if (chosen_[p]) add_lost_of_hidden(tokens, span, static_cast<int>(p));
        });
#endif
  }

  // Stores gradients that were summed beside.
  void finish() {
    for (int64_t t = 0; lost_ && t < p_.T; t++)
      add_row<T>(dhidden_ + t * dhidden_ld(), lost_ + t * p_.C, p_.C, false);
    if (p_.dhidden && !own(p_.dhidden))
      for (int64_t t = 0; t < p_.T; t++) put_numbers(p_.dhidden, t, dhidden_ + t * p_.C, p_.C);
    if (p_.dbias && !own(p_.dbias)) put_numbers(p_.dbias, 0, dbias_, p_.V);
    if (!p_.dweight || p_.T > 0 || p_.options.accumulate_dweight) return;
    for (int64_t v = 0; v < p_.V; v++)
      std::memset(const_cast<char*>(row_of(p_.dweight, v)), 0,
                  static_cast<size_t>(p_.C * bytes_of(p_.dweight.storage)));
  }

 private:
  // --- Where things are -------

  static bool own(const Matrix& x) { return !x || x.storage == kStorageOf<T>; }
  static T* data(const Matrix& x) { return static_cast<T*>(const_cast<void*>(x.data)); }
  int64_t dhidden_ld() const { return own(p_.dhidden) ? p_.dhidden.row : p_.C; }
  E* scratch(int slot) const { return scratch_ + slot * scratch_size_; }
  template <class U>
  U* at(U* logits, int panel, int row) const {
    return logits + (panel * classes_ + row) * kPanel;
  }
  // Of a tile of a panel, the first of whose classes is `row` of the span.
  uint16_t* filled_at(int panel, int row) const {
    return filled_ + (panel * classes_ + row) / kTileClasses;
  }
  // How many pairs a gradient is rounded to: what is not rounded in the end keeps 16 bits.
  static int parts_of(const Matrix& gradient) {
    if (!kPairs<E> || !gradient) return 0;
    return gradient.storage == Storage::kBfloat16 ? 1 : 2;
  }
  int64_t weight_image_at(int panel, int row) const {
    return (panel * classes_ + row) * kPanelElements<E>;
  }
  int64_t hidden_image_at(int panel, int row) const {
    return (panel * classes_ + row) / kFold<E> * kPanel;
  }
  LogitTile<T> tile(T* s, const Tokens& tokens, const Span<T>& span, int panel, int row,
                    int count) const {
    const int64_t v = span.first + row;
    const T* weights = static_cast<const T*>(p_.class_weight);
    return {at(s, panel, row), count, v, tokens.first + panel * kPanel,
            weights ? weights + v : nullptr};
  }

  template <class F>
  void each_tile(const Span<T>& span, const F& f) const {
    each_task(threads_, (span.count + kTileClasses - 1) / kTileClasses, [&](int slot, int64_t i) {
      const int first = static_cast<int>(i) * kTileClasses;
      f(slot, first, std::min(kTileClasses, span.count - first));
    });
  }
  template <class F>
  void each_panel(const Tokens& tokens, const F& f) const {
    for (int p = 0; p < tokens.panels(); p++)
      if (chosen_[p]) f(p);
  }
  template <class F>
  void each_term(const Span<T>& span, const F& f) const {
    if (!second_) return f(Term{span.s, &p_.weight, &hidden_});
    f(Term{span.ts, &p_.weight, &hidden_});
    if (p_.tweight || p_.thidden) f(Term{span.s, &p_.tweight, &thidden_});
  }

  // --- Rows -------

  void place_packed(Arena& arena, PackedTokens* packed, bool wanted) {
    const int64_t tokens = wanted ? int64_t{panels_} * kPanel : 0;
    packed->rows = arena.take<X>(tokens * elements_ * kFold<E>);
    packed->lanes = arena.take<E>(tokens * elements_);
    packed->blocks = arena.take<E>(p_.dweight ? tokens / kFold<E> * blocks_ * kW : 0);
  }

  static void convert_numbers(const Matrix& from, T* to) {
    convert_row<T>(row_of(from, 0), from.storage, static_cast<int>(from.row), to);
  }
  static void put_numbers(const Matrix& to, int64_t row, const T* from, int64_t n) {
    char* at = const_cast<char*>(row_of(to, row));
    if constexpr (sizeof(T) == 4) {
      if (to.storage == Storage::kBfloat16)
        narrow_row(from, static_cast<int>(n), reinterpret_cast<Bf16*>(at));
      else
        narrow_row(from, static_cast<int>(n), reinterpret_cast<F16*>(at));
    }
  }

  // A row of elements, the last of which may be half a pair.
  void convert(const char* from, Storage storage, X* to) const {
    if constexpr (kPairs<E>) {
      std::memcpy(to, from, sizeof(X) * static_cast<size_t>(p_.C));
      if (p_.C % 2) to[p_.C] = X{};
      (void)storage;
    } else {
      convert_row<T>(from, storage, static_cast<int>(p_.C), to);
    }
  }

  Rows<E> weight_rows(const Matrix& x, int64_t first, int count, E* to) const {
    const bool here = x.storage == kStorage<E> && x.row % kFold<E> == 0 && p_.C % kFold<E> == 0;
    if (here) return {reinterpret_cast<const E*>(row_of(x, first)), x.row / kFold<E>};
    for (int i = 0; i < count; i++)
      convert(row_of(x, first + i), x.storage, reinterpret_cast<X*>(to + i * elements_));
    return {to, elements_};
  }

  void pack_panel(const Matrix& x, const Tokens& tokens, int panel, PackedTokens* to) const {
    const int64_t ld = elements_ * kFold<E>;
    const int first = panel * kPanel, count = std::min(kPanel, tokens.count - first);
    X* rows = to->rows + first * ld;
    std::memset(rows, 0, sizeof(X) * static_cast<size_t>(kPanel * ld));
    for (int i = 0; i < count; i++)
      convert(row_of(x, tokens.first + first + i), x.storage, rows + i * ld);
    E* lanes = to->lanes + int64_t{panel} * elements_ * kPanel;
    for (int g = 0; g < kPanel; g += kGroup) {
      const int columns = static_cast<int>(ld);
      if constexpr (kPairs<E>)
        pack_lanes_pairs(rows + g * ld, ld, columns, kGroup, lanes + g);
      else
        pack_lanes<T>(rows + g * ld, ld, columns, kGroup, T{1}, lanes + g);
    }
    if (!p_.dweight) return;
    // What no gradient comes from may not be finite.
    for (int i = 0; i < count; i++)
      if (!tokens_.wanted(tokens.first + first + i))
        std::memset(rows + i * ld, 0, sizeof(X) * static_cast<size_t>(ld));
    const int64_t block_rows = int64_t{panels_} * kPanelElements<E>;
    E* blocks = to->blocks + int64_t{panel} * kPanelElements<E> * kW;
    if constexpr (kPairs<E>)
      interleave_blocks<kW>(rows, ld, static_cast<int>(p_.C), kPanel, blocks, block_rows);
    else
      pack_blocks<T, kW>(rows, ld, static_cast<int>(p_.C), kPanel, T{1}, blocks, block_rows);
  }

  // --- Products -------

  void add_products(const Rows<E>& rows, const PackedTokens& hidden, const Tokens& tokens,
                    int first, int count, bool set, T* to) const {
    if (elements_ == 0 && set)
      each_panel(tokens, [&](int p) {
        std::memset(at(to, p, first), 0, sizeof(T) * static_cast<size_t>(count * kPanel));
      });
    for (int64_t k = 0; k < elements_; k += kChainColumns) {
      const int depth = static_cast<int>(std::min<int64_t>(kChainColumns, elements_ - k));
      each_panel(tokens, [&](int p) {
        add_logits<E>(rows.at + k, rows.ld, count, hidden.lanes + (p * elements_ + k) * kPanel,
                      depth, set && k == 0, at(to, p, first));
      });
    }
  }

  void put_tile(const Tokens& tokens, const Span<T>& span, int panel, int first, int count) {
    const LogitTile<T> here = tile(span.s, tokens, span, panel, first, count);
    if (second_)
      put_gradient_tangents<T>(here, at(span.ts, panel, first), tokens_.form().cap,
                               tokens_.lanes());
    else
      put_gradients<T>(here, tokens_.form(), tokens_.plain(), tokens_.lanes());
    if (filled_)
      *filled_at(panel, first) =
          static_cast<uint16_t>(filled_classes<T>(here.s, count, kFilledClasses));
#if defined(TW_HAS_PAIRS)
    if constexpr (kPairs<E>) make_images(here.s, panel, first, count);
#endif
  }

  void add_bias_gradient(const Tokens& tokens, const Span<T>& span, int first, int count) {
    T* s = second_ ? span.ts : span.s;
    each_panel(tokens, [&](int p) {
      const T* from = at(s, p, first);
      for (int i = 0; i < count; i++, from += kPanel) {
        Vec<T> x[kRegs<T>];
        TW_UNROLL for (int r = 0; r < kRegs<T>; r++) {
          const T* lane = from + r * kWidth<T>;
          x[r] = load(lane) + load(lane + kGroup) + load(lane + 2 * kGroup);
        }
        dbias_[span.first + first + i] +=
            tree<T>(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
      }
    });
  }

  void add_weight_tile(const Tokens& tokens, const Span<T>& span, int first, int count, bool last) {
    const bool here = own(p_.dweight);
    const int64_t ld = here ? p_.dweight.row : p_.C, v = span.first + first;
    T* to = here ? data(p_.dweight) + v * ld : dweight_ + first * ld;
    bool set = tokens.first == 0 && !(here && p_.options.accumulate_dweight);
    each_term(span, [&](const Term& term) {
      if (!term.hidden->blocks || (term.hidden == &thidden_ && !p_.thidden)) return;
      const int64_t next = classes_ * kPanelElements<E>;
      auto filled = [&](int p) __attribute__((always_inline)) {
        if (!chosen_[p]) return uint32_t{0};
        return filled_ ? *filled_at(p, first) : kAllFilled;
      };
      for (int64_t b = 0; b < blocks_; b++) {
        const E* hidden = term.hidden->blocks + b * panels_ * kPanelElements<E> * kW;
        for (int part = 0; part < std::max(1, parts_of(p_.dweight)); part++) {
          const E* dz = kPairs<E> ? weight_image_[part] + weight_image_at(0, first)
                                  : reinterpret_cast<const E*>(at(term.s, 0, first));
          add_weight_gradient<E>(dz, next, count, tokens.panels(), filled, hidden, block_columns(b),
                                 set && part == 0, to + b * kW, ld);
        }
      }
      set = false;
    });
#if defined(TW_HAS_PAIRS)
    if constexpr (kPairs<E>)
      if (parts_of(p_.dweight) == 1) add_lost_of_weight(tokens, span, first, count, to, ld);
#endif
    if (here || !last) return;
    for (int i = 0; i < count; i++) store_weight_row(v + i, to + i * ld);
  }

  void store_weight_row(int64_t v, T* row) const {
    if constexpr (sizeof(T) == 4)
      if (p_.options.accumulate_dweight) {
        alignas(64) T old[kW];
        for (int64_t c = 0; c < p_.C; c += kW) {
          const int n = static_cast<int>(std::min<int64_t>(kW, p_.C - c));
          convert_row<T>(row_of(p_.dweight, v) + 2 * c, p_.dweight.storage, n, old);
          for (int i = 0; i < n; i++) row[c + i] += old[i];
        }
      }
    put_numbers(p_.dweight, v, row, p_.C);
  }

  int block_columns(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kW, p_.C - block * kW));
  }

  // Rows of weights as a block of columns.
  void pack_weight_block(const Matrix& x, int64_t first, int count, int64_t block, E* to) const {
    const int columns = block_columns(block);
    const char* from = row_of(x, first) + block * kW * bytes_of(x.storage);
    if constexpr (kPairs<E>) {
      interleave_blocks<kW>(reinterpret_cast<const Bf16*>(from), x.row, columns, count, to, 0);
    } else if (x.storage == kStorage<E>) {
      pack_blocks<T, kW>(reinterpret_cast<const T*>(from), x.row, columns, count, T{1}, to, 0);
    } else {
      for (int i = 0; i < count; i++, from += x.row * bytes_of(x.storage), to += kW) {
        convert_row<T>(from, x.storage, columns, to);
        for (int c = columns; c < kW; c++) to[c] = 0;
      }
    }
  }

  void add_hidden_block(const Term& term, const Tokens& tokens, const Span<T>& span, int slot,
                        int64_t block, int64_t group, int64_t groups) {
    if (!*term.weight) return;
    E* weights = scratch(slot) + kTileClasses * elements_;
    for (int i = 0; i < span.count; i += kChainClasses) {
      const int count = std::min(kChainClasses, span.count - i);
      pack_weight_block(*term.weight, span.first + i, count, block, weights);
      each_panel(tokens, [&](int p) {
        if (p % groups != group) return;
        T* to = dhidden_ + (tokens.first + p * kPanel) * dhidden_ld() + block * kW;
        const uint32_t filled = filled_ ? *filled_at(p, i) : kAllFilled;
        for (int part = 0; part < std::max(1, parts_of(p_.dhidden)); part++) {
          const E* dz = kPairs<E> ? hidden_image_[part] + hidden_image_at(p, i)
                                  : reinterpret_cast<const E*>(at(term.s, p, i));
          add_hidden_gradient<E>(dz, std::min(kPanel, tokens.count - p * kPanel), weights,
                                 (count + kFold<E> - 1) / kFold<E>, filled, block_columns(block),
                                 to, dhidden_ld());
        }
      });
    }
  }

#if defined(TW_HAS_PAIRS)
  // --- Gradients rounded to pairs, over tokens for dW and over classes for dh. Where there is one
  // part, what large entries lose is added as it is: at most some tens a token --------

  // What is left of x for the parts after the first.
  static TW_MEMBER VecF part_of(VecF x, int part) { return part == 0 ? x : x - rounded_to_bf16(x); }

  void make_images(const T* dz, int panel, int first, int count) {
    for (int part = 0; part < parts_of(p_.dweight); part++) {
      Bf16* to = reinterpret_cast<Bf16*>(weight_image_[part] + weight_image_at(panel, first));
      for (int i = 0; i < count * kPanelGroups; i++) {
        const VecF x = part_of(load(dz + i * kGroup), part);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * kGroup),
                            (__m256i)_mm512_cvtneps_pbh((__m512)x));
      }
    }
    for (int part = 0; part < parts_of(p_.dhidden); part++) {
      E* to = hidden_image_[part] + hidden_image_at(panel, first);
      for (int i = 0; i < count; i += 2, to += kPanel)
        TW_UNROLL for (int n = 0; n < kPanelGroups; n++) {
          const T* row = dz + i * kPanel + n * kGroup;
          const VecF next = i + 1 < count ? load(row + kPanel) : zero<T>();
          store_pairs(to + n * kGroup, part_of(load(row), part), part_of(next, part));
        }
    }
  }

  // f(class of the span, token of the panel, what is lost) for large entries.
  template <class F>
  void each_lost(const Tokens& tokens, const Span<T>& span, int panel, int first, int count,
                 const F& f) const {
    const T* large = tokens_.lanes().large + tokens.first + panel * kPanel;
    const T* row = at(span.s, panel, first);
    for (int i = first; i < first + count; i++, row += kPanel)
      TW_UNROLL for (int n = 0; n < kPanelGroups; n++) {
        const VecF x = load(row + n * kGroup), least = load(large + n * kGroup);
        uint32_t found = _mm512_cmp_ps_mask((__m512)abs(x), (__m512)least, _CMP_GT_OQ);
        if (!found) continue;
        const VecF lost = x - rounded_to_bf16(x);
        for (; found; found &= found - 1) {
          const int lane = __builtin_ctz(found);
          f(i, n * kGroup + lane, lost[lane]);
        }
      }
  }

  // to[c] += lost * from[c]
  void add_row_of(const Bf16* from, T lost, T* to) const {
    int64_t c = 0;
    for (; c + kGroup <= p_.C; c += kGroup)
      store(to + c, fma(set1(lost), widen(from + c), load(to + c)));
    for (; c < p_.C; c++) to[c] = __builtin_fmaf(lost, to_float(from[c]), to[c]);
  }

  void add_lost_of_weight(const Tokens& tokens, const Span<T>& span, int first, int count, T* dw,
                          int64_t ld) const {
    each_panel(tokens, [&](int p) {
      each_lost(tokens, span, p, first, count, [&](int i, int lane, T lost) {
        const X* h = hidden_.rows + (p * kPanel + lane) * elements_ * kFold<E>;
        add_row_of(h, lost, dw + (i - first) * ld);
      });
    });
  }

  void add_lost_of_hidden(const Tokens& tokens, const Span<T>& span, int panel) const {
    each_lost(tokens, span, panel, 0, span.count, [&](int i, int lane, T lost) {
      const Bf16* w = reinterpret_cast<const Bf16*>(row_of(p_.weight, span.first + i));
      add_row_of(w, lost, lost_ + (tokens.first + panel * kPanel + lane) * p_.C);
    });
  }
#endif

  const LinearCrossEntropyProblem& p_;
  const int threads_;
  const bool second_;
  const int64_t elements_, blocks_;  // of a row: elements, blocks of columns
  const int panels_;
  const int64_t classes_;
  TokenNumbers<T> tokens_;
  PackedTokens hidden_, thidden_;
  E *weight_image_[2] = {}, *hidden_image_[2] = {}, *scratch_ = nullptr;
  T *bias_ = nullptr, *tbias_ = nullptr, *dhidden_ = nullptr, *dweight_ = nullptr,
    *dbias_ = nullptr;
  T* lost_ =
      nullptr;  // of dhidden: summed on its own, so that blocks of classes stay out of the bits
  int64_t scratch_size_ = 0;
  bool* chosen_ = nullptr;
  uint16_t* filled_ = nullptr;  // what is other than zero, where small gradients are left out
};

#include "simd/end.hpp"
