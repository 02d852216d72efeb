// Products by tile registers. A block of sums lies in registers 0 to 5 while the terms, in steps of
// kSide pairs, come in through the others; sums leave through a buffer in the first-level cache.
#pragma once
#include <utility>

#include "simd/transpose-inl.hpp"
#include "tile/segments-inl.hpp"

#if defined(TW_HAS_TILES)
#include "simd/begin.hpp"

namespace tiled {

using E = Bf16x2;
constexpr int kTerms = 2 * kSide;  // of a step
constexpr int kSquare = kSide * kSide;
constexpr int kMostSteps = 8;  // of a tile of keys

// f(0), ..., f(N - 1) with constants
template <int N, class F>
TW_INLINE void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// One factor of a block: rows `stride` apart in a tile, `next` to the tiles of the block's next row
// or column, `step` to those of the next step.
struct Operand {
  const E* at;
  int64_t stride, next, step;
  template <int T>
  TW_MEMBER void load(int i, int64_t k) const {
    tile_load<T>(at + k * step + i * next, stride * static_cast<int64_t>(sizeof(E)));
  }
};

template <int MR, int NR>
TW_INLINE void clear_block() {
  each<MR * NR>([](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
}

template <int MR, int NR>
TW_INLINE void store_block(float* to) {
  each<MR * NR>([&](auto t) __attribute__((always_inline)) {
    constexpr int i = decltype(t)::value / NR, n = decltype(t)::value % NR;
    tile_store<decltype(t)::value>(to + (i * kSide * NR + n) * kSide, NR * 4 * kSide);
  });
}

// Step k of a block. With six tiles of sums two are left, and neighbouring products share one.
template <int MR, int NR>
TW_INLINE void add_step(const Operand& a, const Operand& b, int64_t k) {
  static_assert(MR <= 2 && NR <= 3);
  constexpr bool kAll = MR * NR <= 4;  // all tiles of A stay
  if constexpr (kAll)
    each<MR>([&](auto i) __attribute__((always_inline)) {
      a.template load<4 + decltype(i)::value>(decltype(i)::value, k);
    });
  else
    a.template load<6>(0, k);
  each<NR>([&](auto column) __attribute__((always_inline)) {
    constexpr int n = decltype(column)::value, kB = kAll ? 6 + n % 2 : 7;
    b.template load<kB>(n, k);
    each<MR>([&](auto turn) __attribute__((always_inline)) {
      constexpr int t = decltype(turn)::value, i = n % 2 ? MR - 1 - t : t;
      if constexpr (!kAll && t > 0) a.template load<6>(i, k);
      tile_multiply<i * NR + n, kAll ? 4 + i : 6, kB>();
    });
  });
}

// --- Scores: rows of keys as they stand times the panel. The first kSide rows of a tile of keys
// can be read, also where it has fewer --------

template <int MR, int NR, int COUNT>
TW_INLINE void multiply_scores(const Factor<E>* factors, int depth, int j, int next, int n0,
                               float* sums) {
  clear_block<MR, NR>();
  for (int f = 0; f < COUNT; f++) {
    const int64_t lda = factors[f].lda;
    const Operand a{factors[f].a + j * lda, lda, next * lda, kSide};
    const Operand b{factors[f].b + n0 * kSide, kPanel, kSide, kSide * kPanel};
    for (int k = 0; k * kSide < depth; k++) add_step<MR, NR>(a, b, k);
  }
  store_block<MR, NR>(sums);
}

// Hands rows of sums, keys [ja, jb), to the epilogue.
template <int NR, class Epilogue>
TW_INLINE void put_scores(const float* sums, const Epilogue& epilogue, float scale, int ja, int jb,
                          int n0) {
  [&]<int... N>(std::integer_sequence<int, N...>) __attribute__((always_inline)) {
    typename Epilogue::Column columns[] = {typename Epilogue::Column(epilogue, n0 + N)...};
    const Vec<float> s = set1(scale);
#pragma GCC unroll 2
    for (int j = ja; j < jb; j++, sums += NR * kSide)
      (columns[N].put(j, load(sums + N * kSide) * s), ...);
    (columns[N].finish(), ...);
  }(std::make_integer_sequence<int, NR>{});
}

// The products of a block are made before the epilogue of the one before it, beside which they run.
template <int NR, int COUNT, class Epilogue>
TW_NOINLINE void scores_columns(const Factor<E>* factors, int depth, const Epilogue& epilogue,
                                float scale, int ja, int jb, int n0) {
  constexpr int kRows = 2 * kSide;
  alignas(64) float sums[2][kRows * NR * kSide];
  // Rows beyond jb may not exist: the last tile of rows overlaps the one before it.
  auto first = [&](int j) __attribute__((always_inline)) {
    const int at = j + kSide < jb ? j : jb - kSide;
    return at > 0 ? at : 0;
  };
  auto multiply = [&](int j, float* to) __attribute__((always_inline)) {
    if (j + kSide < jb)
      multiply_scores<2, NR, COUNT>(factors, depth, j, first(j + kSide) - j, n0, to);
    else
      multiply_scores<1, NR, COUNT>(factors, depth, first(j), 0, n0, to);
  };
  auto put = [&](int j, const float* from) __attribute__((always_inline)) {
    for (int t = j; t < std::min(j + kRows, jb); t += kSide)
      put_scores<NR>(from + (t - j + t - first(t)) * NR * kSide, epilogue, scale, t,
                     std::min(t + kSide, jb), n0);
  };
  multiply(ja, sums[0]);
  for (int j = ja, turn = 0; j < jb; j += kRows, turn ^= 1) {
    if (j + kRows < jb) multiply(j + kRows, sums[turn ^ 1]);
    put(j, sums[turn]);
  }
}

template <int COUNT, class Epilogue>
TW_INLINE void scores_of(const Factor<E>* factors, int depth, const Epilogue& epilogue,
                         const Segment& s, float scale) {
  switch (s.nb - s.na) {
    case 1:
      return scores_columns<1, COUNT>(factors, depth, epilogue, scale, s.ja, s.jb, s.na);
    case 2:
      return scores_columns<2, COUNT>(factors, depth, epilogue, scale, s.ja, s.jb, s.na);
    default:
      return scores_columns<3, COUNT>(factors, depth, epilogue, scale, s.ja, s.jb, s.na);
  }
}

// --- Weighted sum. A factor's `a` holds tiles of [column][pair of keys], `lda` from one block of
// kSide columns to the next; its weights are +0 in every pair of a reached step that is not seen
// ---

// The steps of a tile of keys that some segment reaches, and the groups.
struct Reached {
  uint32_t steps = 0;
  int na = kPanelGroups, nb = 0;
  Reached(const Segment* segments, int count) {
    for (int i = 0; i < count; i++) {
      const Segment& s = segments[i];
      for (int k = s.ja / kTerms; k * kTerms < s.jb; k++) steps |= 1u << k;
      na = std::min(na, s.na);
      nb = std::max(nb, s.nb);
    }
  }
};

// Zeros in the reached steps that segments do not fill.
TW_NOINLINE __attribute__((unused)) void clear_weights(const Segment* segments, int count,
                                                       E* weights) {
  const Reached reached(segments, count);
  uint32_t left = reached.steps;
  for (int i = 0; i < count; i++) {
    const Segment& s = segments[i];
    if (s.na != reached.na || s.nb != reached.nb) continue;
    for (int k = (s.ja + kTerms - 1) / kTerms; (k + 1) * kTerms <= s.jb; k++) left &= ~(1u << k);
  }
  for (int k = 0; left >> k; k++)
    if (left >> k & 1)
      std::memset(static_cast<void*>(weights + k * kSide * kPanel), 0, sizeof(E) * kSide * kPanel);
}

// Bits of the pairs' halves that are infinite or NaN; those are set to zero.
TW_INLINE __mmask32 take_not_finite(__m512i* x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  const __mmask32 bad = _mm512_cmpeq_epi16_mask(_mm512_and_si512(*x, exponent), exponent);
  *x = _mm512_mask_mov_epi16(*x, bad, _mm512_setzero_si512());
  return bad;
}

// Copies rows of `width` elements, with zeros for what is not finite.
TW_NOINLINE __attribute__((unused)) void copy_finite(const E* from, int64_t ld, int rows, int width,
                                                     E* to) {
  for (int r = 0; r < rows; r++)
    for (int e = 0; e < width; e += kSide) {
      __m512i x = _mm512_loadu_si512(from + r * ld + e);
      take_not_finite(&x);
      _mm512_storeu_si512(to + r * width + e, x);
    }
}

TW_INLINE bool not_finite(Bf16 x) {
  return (x.bits & 0x7f80) == 0x7f80;
}
TW_INLINE Bf16 half(E x, int which) {
  return which ? x.second : x.first;
}
// One half of each pair as numbers.
TW_INLINE VecF half(VecI x, int which) {
  return (VecF)(which ? x & static_cast<int>(0xffff0000) : x << 16);
}

// What the values left out by copy_finite, in two blocks of columns, add to the lanes that see
// them.
TW_NOINLINE __attribute__((unused)) void add_not_finite(const Factor<E>& f, const E* tiles,
                                                        const Run& run, float* c) {
  for (int i = 0; i < run.count; i++) {
    const Segment& s = run.segments[i];
    for (int j = s.ja; j < s.jb; j++)
      for (int d = 0; d < 2 * kSide; d++) {
        const E pair =
            tiles[d / kSide * f.lda + (j / kTerms * kSide + d % kSide) * kSide + j % kTerms / 2];
        const Bf16 x = half(pair, j % 2);
        if (!not_finite(x)) continue;
        for (int n = s.na; n < s.nb; n++) {
          const auto seen = s.edge ? edge_lanes<float>(run.words, j, n) : lanes<float>(0xffff);
          const VecF w = half(load(f.b + j / 2 * kPanel + n * kSide), j % 2);
          float* to = c + d * kPanel + n * kSide;
          store(to, fma_where(seen, set1(to_float(x)), w, load(to)));
        }
      }
  }
}

// One chain over the tile of keys, the sums of its steps, is added after the rescaling.
template <int NR, int COUNT>
TW_NOINLINE void weighted_columns(const Factor<E>* factors, int columns, const Run& run,
                                  const Reached& reached, float* c, const float* alpha) {
  constexpr int kColumns = 2 * kSide;
  alignas(64) float sums[kColumns * NR * kSide];
  alignas(64) E clean[COUNT][2 * kMostSteps * kSquare];
  const int n0 = reached.na;
  for (int d = 0; d < columns; d += kColumns, c += kColumns * kPanel) {
    clear_block<2, NR>();
    for (int f = 0; f < COUNT; f++) {
      const E* tiles = factors[f].a + d / kSide * factors[f].lda;
      Operand a{tiles, kSide, factors[f].lda, kSquare};
      if (!run.finite) {
        copy_finite(tiles, factors[f].lda, 2, kMostSteps * kSquare, clean[f]);
        a = {clean[f], kSide, kMostSteps * kSquare, kSquare};
      }
      const Operand b{factors[f].b + n0 * kSide, kPanel, kSide, kSide * kPanel};
      for (uint32_t left = reached.steps; left; left &= left - 1)
        add_step<2, NR>(a, b, __builtin_ctz(left));
    }
    store_block<2, NR>(sums);
    for (int n = 0; n < NR; n++) {
      const VecF al = load(alpha + (n0 + n) * kSide);
#pragma GCC unroll 4
      for (int i = 0; i < kColumns; i++) {
        float* to = c + i * kPanel + (n0 + n) * kSide;
        store(to, fma(load(to), al, load(sums + (i * NR + n) * kSide)));
      }
    }
    for (int f = 0; f < COUNT && !run.finite; f++)
      add_not_finite(factors[f], factors[f].a + d / kSide * factors[f].lda, run, c);
  }
}

template <int COUNT>
TW_INLINE void weighted_sum(const Factor<E>* factors, int columns, const Run& run, float* c,
                            const float* alpha) {
  const Reached reached(run.segments, run.count);
  switch (reached.nb - reached.na) {
    case 1:
      return weighted_columns<1, COUNT>(factors, columns, run, reached, c, alpha);
    case 2:
      return weighted_columns<2, COUNT>(factors, columns, run, reached, c, alpha);
    default:
      return weighted_columns<3, COUNT>(factors, columns, run, reached, c, alpha);
  }
}

// Values of a tile for weighted_sum, zero beyond the last row: out[d / kSide * ldo] holds
// [step][d % kSide][pair of rows].
TW_NOINLINE __attribute__((unused)) void pack_values(const Bf16* x, int64_t ld, int rows,
                                                     int columns, E* out, int64_t ldo) {
  alignas(64) static constexpr uint16_t kOrder[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  for (int j = 0; j < rows; j += kTerms, out += kSquare)
    for (int d = 0; d < columns; d += kTerms) {
      VecI lo[kSide], hi[kSide];
      auto row = [&](int r) __attribute__((always_inline)) {
        return r < rows ? _mm512_loadu_si512(x + r * ld + d) : _mm512_setzero_si512();
      };
      TW_UNROLL for (int i = 0; i < kSide; i++) {
        const __m512i a = row(j + 2 * i), b = row(j + 2 * i + 1);
        lo[i] = (VecI)_mm512_permutexvar_epi16(order,
                                               _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1));
        hi[i] = (VecI)_mm512_permutexvar_epi16(order, _mm512_shuffle_i64x2(a, b, 0xee));
      }
      transpose16(lo);
      transpose16(hi);
      E* to = out + d / kSide * ldo;
      TW_UNROLL for (int i = 0; i < kSide; i++) store(to + i * kSide, lo[i]);
      TW_UNROLL for (int i = 0; i < kSide; i++) store(to + ldo + i * kSide, hi[i]);
    }
}

// Zeros after the pairs of n rows, up to a whole step.
TW_INLINE void clear_pairs(int n, int columns, E* pairs) {
  const int from = (n + 1) / 2, to = (n + kTerms - 1) / kTerms * kSide;
  std::memset(static_cast<void*>(pairs + from * columns), 0,
              sizeof(E) * static_cast<size_t>((to - from) * columns));
}

TW_INLINE VecF first_lanes(int n, VecF x) {
  return n >= kSide ? x : select(lanes<float>(n > 0 ? (1u << n) - 1 : 0), x, zero<float>());
}

// out[lane][pair of keys] from x[key][lane] for kSide lanes, zeros up to a whole step.
TW_NOINLINE __attribute__((unused)) void pack_weights(const float* x, int64_t ld, int keys, E* out,
                                                      int64_t ldo) {
  for (int j = 0; j < keys; j += kTerms, out += kSide) {
    VecI t[kSide];
    auto row = [&](int r) __attribute__((always_inline)) {
      return r < keys ? load(x + r * ld) : zero<float>();
    };
    TW_UNROLL for (int i = 0; i < kSide; i++) t[i] = lane_pairs(row(j + 2 * i), row(j + 2 * i + 1));
    transpose16(t);
    TW_UNROLL for (int i = 0; i < kSide; i++) store(out + i * ldo, t[i]);
  }
}

// --- Gradients: C[i][column] += sum_k A[i][k] B[k][column], one chain over `steps` --------

template <int MR, int NR>
TW_NOINLINE void add_block(const Operand& a, const Operand& b, int steps, int rows, float* c,
                           int64_t ldc) {
  alignas(64) float sums[MR * kSide * NR * kSide];
  clear_block<MR, NR>();
  for (int k = 0; k < steps; k++) add_step<MR, NR>(a, b, k);
  store_block<MR, NR>(sums);
#pragma GCC unroll 4
  for (int i = 0; i < rows; i++) TW_UNROLL for (int n = 0; n < NR; n++) {
      float* to = c + i * ldc + n * kSide;
      store(to, load(to) + load(sums + (i * NR + n) * kSide));
    }
}

// At most 2 kSide rows, and 2 kSide columns; A can be read up to a multiple of kSide.
TW_INLINE void add_product(const Operand& a, const Operand& b, int steps, int rows, float* c,
                           int64_t ldc) {
  if (steps <= 0) return;
  if (rows > kSide)
    add_block<2, 2>(a, b, steps, rows, c, ldc);
  else
    add_block<1, 2>(a, b, steps, rows, c, ldc);
}

}  // namespace tiled

#include "simd/end.hpp"
#endif
