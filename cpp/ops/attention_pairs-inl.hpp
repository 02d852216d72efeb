// A pair of tiles of the backward pass, kGradQueries queries and kGradKeys keys: which pairs are
// seen, and the products of their weights with rows.
#pragma once
#include "ops/attention_logits-inl.hpp"

#include "simd/begin.hpp"

constexpr int kGradQueries = 192;
constexpr int kGradKeys = 96;
constexpr int kGradSteps = kGradKeys / kStep;
constexpr int kGradGroups = kGradQueries / kGroup;
constexpr int kGradPanels = kGradQueries / kPanel;
static_assert(kGradQueries % kPanel == 0 && kGradKeys % kStep == 0);

// Who sees whom in a pair of tiles.
class PairMask {
 public:
  bool whole = true;  // every pair is seen
  Segment segments[kGradPanels][kGradSteps];
  int counts[kGradPanels];

  // False where no pair is seen.
  bool load(const MaskBlock& mask, int rows, int64_t k0, int keys) {
    std::memset(seen_, 0, sizeof seen_);
    rows_ = rows;
    groups_ = mask.groups;
    keys_ = keys;
    bool any = false;
    whole = true;
    for (int p = 0; p * kPanel < rows; p++) {
      counts[p] = mask.segments(p * kPanelGroups, k0, keys, segments[p],
                                words_ + p * kGradKeys * kPanelGroups);
      const int groups = std::min(kPanelGroups, groups_ - p * kPanelGroups);
      int pairs = 0;
      for (int i = 0; i < counts[p]; i++) {
        Segment& s = segments[p][i];
        s.nb = std::min(s.nb, groups);
        any = true;
        whole &= !s.edge;
        pairs += (s.jb - s.ja) * (s.nb - s.na);
        for (int j = s.ja; j < s.jb; j += kStep)
          for (int g = s.na; g < s.nb; g++)
            seen_[j / kStep][p * kPanelGroups + g] = s.edge ? Seen::kSome : Seen::kAll;
      }
      whole &= pairs == keys * groups;
    }
    return any;
  }

  const uint16_t* words(int panel) const { return words_ + panel * kGradKeys * kPanelGroups; }
  int rows() const { return rows_; }
  int keys() const { return keys_; }
  int groups() const { return groups_; }
  bool none(int j, int g) const { return seen_[j / kStep][g] == Seen::kNone; }

  // The queries [qa, qb) that see some of the keys [ja, jb), and the other way round.
  void queries_of(int ja, int jb, int* qa, int* qb) const {
    int ga = kGradGroups, gb = 0;
    if (whole) ga = 0, gb = groups_;
    for (int s = ja / kStep; !whole && s * kStep < jb; s++)
      for (int g = 0; g < groups_; g++)
        if (seen_[s][g] != Seen::kNone) ga = std::min(ga, g), gb = std::max(gb, g + 1);
    *qa = std::min(ga * kGroup, rows_);
    *qb = std::min(gb * kGroup, rows_);
  }
  void keys_of(int qa, int qb, int* ja, int* jb) const {
    int sa = kGradSteps, sb = 0;
    if (whole) sa = 0, sb = kGradSteps;
    for (int g = qa / kGroup; !whole && g * kGroup < qb; g++)
      for (int s = 0; s < kGradSteps; s++)
        if (seen_[s][g] != Seen::kNone) sa = std::min(sa, s), sb = std::max(sb, s + 1);
    *ja = std::min(sa * kStep, keys_);
    *jb = std::min(sb * kStep, keys_);
  }

  bool sees(int j, int q) const {
    const int g = q / kGroup;
    const Seen s = seen_[j / kStep][g];
    if (s != Seen::kSome) return s == Seen::kAll;
    return words(g / kPanelGroups)[j * kPanelGroups + g % kPanelGroups] >> (q % kGroup) & 1;
  }

 private:
  int rows_ = 0, keys_ = 0, groups_ = 0;
  Seen seen_[kGradSteps][kGradGroups];
  alignas(64) uint16_t words_[kGradPanels * kGradKeys * kPanelGroups];
};

// Weights and the rows they multiply. Numbers: weights [key][kGradQueries], rows of queries in
// blocks of kGradWidth columns, rows of keys one after another. Pairs E over queries: weights
// [key][kGradQueries / 2] and blocks of pairs of rows; over keys: weights [key / 2][kGradQueries]
// and rows [key / 2]. What an odd last query or key is paired with is +0 in both. Tile registers
// take weights over keys as [query][key / 2], and +0 in both up to a multiple of their terms.
template <class E>
struct Terms {
  struct Term {
    const E *weights, *rows;
  };
  Term of[2];
  int count = 0;
  void add(const E* weights, const E* rows) {
    if (weights && rows) of[count++] = {weights, rows};
  }
};

template <class E>
constexpr int kQueryTerms = kGradQueries / kFold<E>;  // elements in a row of weights over queries

template <class E>
TW_INLINE const E* block_row(const E* blocks, int q, int64_t d) {
  return blocks + d / kGradWidth<E> * kQueryTerms<E> * kGradWidth<E> +
         int64_t{q / kFold<E>} * kGradWidth<E> + d % kGradWidth<E>;
}

// Elements that hold n terms.
template <class E>
constexpr int elements_of(int n) {
  return (n + kFold<E> - 1) / kFold<E>;
}

// One row of a sum term by term, for tiles where 0 times a masked NaN or infinity would spread it.
template <class E, class In, class Weight, class Row>
TW_INLINE void add_seen(int n, const In& in, const Weight& weight, const Row& row, Acc<E>* c,
                        int64_t columns) {
  using T = Acc<E>;
  for (int64_t d = 0; d < columns; d += kWidth<T>) {
    Vec<T> acc = zero<T>();
    for (int i = 0; i < n; i += kFold<E>) {
      const bool first = in(i), second = kFold<E> > 1 && i + 1 < n && in(i + 1);
      if (!first && !second) continue;
      Vec<E> x = load(row(i, d));
      if constexpr (kFold<E> > 1)
        x &= seen_halves(lanes<E>(first ? ~0u : 0), lanes<E>(second ? ~0u : 0));
      acc = multiply_add(broadcast(weight(i)), x, acc);
    }
    store(c + d, load(c + d) + acc);
  }
}

#if defined(TW_HAS_TILES)
static_assert(kGradQueries % tiled::kTerms == 0 && kGradKeys % tiled::kTerms == 0);

namespace tiled {

// What the rows' elements left out by copy_finite add where they are seen: `out` rows of c, terms
// in pairs of rows `ld` apart.
template <class Sees, class Weight>
TW_NOINLINE void add_not_finite(const E* rows, int64_t ld, int terms, int columns, int out,
                                const Sees& sees, const Weight& weight, float* c, int64_t ldc) {
  for (int k = 0; k < terms; k++)
    for (int d = 0; d < columns; d += kSide) {
      __m512i pairs = _mm512_loadu_si512(rows + k / 2 * ld + d);
      const VecF x = half((VecI)pairs, k % 2);
      const __mmask16 bad = static_cast<__mmask16>(~equal(x - x, zero<float>()));
      for (int i = 0; bad && i < out; i++) {
        if (!sees(i, k)) continue;
        float* to = c + i * ldc + d;
        store(to, fma_where(bad, set1(to_float(half(*weight(i, k / 2), k % 2))), x, load(to)));
      }
    }
}

// c[key] += sum over queries of weights [key][pair of queries] times rows; every term is one chain.
TW_NOINLINE __attribute__((unused)) void sum_over_queries(const PairMask& mask,
                                                          const Terms<E>& terms, bool finite,
                                                          float* c, int64_t ldc) {
  constexpr int kRows = kQueryTerms<E>, kW = kGradWidth<E>;
  alignas(64) E clean[kRows * kW];
  for (int t = 0; t < terms.count; t++)
    for (int64_t d = 0; d < ldc; d += kW) {
      const E *weights = terms.of[t].weights, *rows = block_row(terms.of[t].rows, 0, d), *b = rows;
      const int pairs = (mask.rows() + kTerms - 1) / kTerms * kSide;
      const int columns = static_cast<int>(std::min<int64_t>(kW, ldc - d));
      if (!finite) copy_finite(rows, kW, pairs, kW, clean), b = clean;
      for (int j = 0; j < mask.keys(); j += 2 * kSide) {
        const int count = std::min(2 * kSide, mask.keys() - j);
        int qa, qb;
        mask.queries_of(j, j + count, &qa, &qb);
        const int first = qa / kTerms, last = (qb + kTerms - 1) / kTerms;
        const Operand a{weights + j * kRows + first * kSide, kRows, kSide * kRows, kSide};
        for (int e = 0; e < columns; e += 2 * kSide)
          add_product(a, {b + first * kSide * kW + e, kW, kSide, kSide * kW}, last - first, count,
                      c + j * ldc + d + e, ldc);
      }
      if (!finite)
        add_not_finite(
            rows, kW, mask.rows(), columns, mask.keys(),
            [&](int j, int q) { return mask.sees(j, q); },
            [&](int j, int pair) { return weights + j * kRows + pair; }, c + d, ldc);
    }
}

// c[query] += sum over keys of weights [query][pair of keys] times rows, `ld` apart as those of c.
TW_NOINLINE __attribute__((unused)) void sum_over_keys(const PairMask& mask, const Terms<E>& terms,
                                                       bool finite, float* c, int64_t ld) {
  constexpr int kPairsOfKeys = kGradKeys / 2, kColumns = 2 * kSide;
  alignas(64) E clean[kPairsOfKeys * kColumns];
  for (int t = 0; t < terms.count; t++)
    for (int64_t d = 0; d < ld; d += kColumns) {
      const E *weights = terms.of[t].weights, *rows = terms.of[t].rows + d;
      Operand b{rows, ld, kSide, kSide * ld};
      if (!finite) {
        copy_finite(rows, ld, (mask.keys() + kTerms - 1) / kTerms * kSide, kColumns, clean);
        b = {clean, kColumns, kSide, kSide * kColumns};
      }
      for (int q = 0; q < mask.rows(); q += 2 * kSide) {
        const int count = std::min(2 * kSide, mask.rows() - q);
        int ja, jb;
        mask.keys_of(q, q + count, &ja, &jb);
        const int first = ja / kTerms, last = (jb + kTerms - 1) / kTerms;
        const E* a = weights + q * kPairsOfKeys + first * kSide;
        add_product({a, kPairsOfKeys, kSide * kPairsOfKeys, kSide},
                    {b.at + first * b.step, b.stride, b.next, b.step}, last - first, count,
                    c + q * ld + d, ld);
      }
      if (!finite)
        add_not_finite(
            rows, ld, mask.keys(), kColumns, mask.rows(),
            [&](int q, int j) { return mask.sees(j, q); },
            [&](int q, int pair) { return weights + q * kPairsOfKeys + pair; }, c + d, ld);
    }
}

}  // namespace tiled
#endif

// c[key] += sum over queries of weights times rows; every term is one chain. Ranges that no pair
// sees are left out.
template <class E>
TW_NOINLINE void sum_over_queries(const PairMask& mask, const Terms<E>& terms, bool finite,
                                  Acc<E>* c, int64_t ldc) {
#if defined(TW_HAS_TILES)
  if constexpr (kTiled<E>) return tiled::sum_over_queries(mask, terms, finite, c, ldc);
#endif
  constexpr int kW = kGradWidth<E>, kTerms = kQueryTerms<E>;
  for (int t = 0; t < terms.count; t++) {
    const E *weights = terms.of[t].weights, *blocks = terms.of[t].rows;
    if (!mask.whole && !finite) {
      for (int j = 0; j < mask.keys(); j++)
        add_seen<E>(
            mask.rows(), [&](int q) { return mask.sees(j, q); },
            [&](int q) { return weights + j * kTerms + q / kFold<E>; },
            [&](int q, int64_t d) { return block_row(blocks, q, d); }, c + j * ldc, ldc);
      continue;
    }
    for (int j = 0; j < mask.keys(); j += kGradRows) {
      const int rows = std::min(kGradRows, mask.keys() - j);
      int qa, qb;
      mask.queries_of(j, j + rows, &qa, &qb);
      const E* b = blocks + int64_t{qa / kFold<E>} * kW;
      for (int64_t d = 0; d < ldc; d += kW, b += kTerms * kW)
        add_product<E, false>(rows, static_cast<int>(std::min<int64_t>(kW, ldc - d)),
                              weights + j * kTerms + qa / kFold<E>, kTerms, b, kW,
                              elements_of<E>(qb - qa), c + j * ldc + d, ldc);
    }
  }
}

// c[query] += sum over keys of weights times rows, which are `ld` apart like those of c.
template <class E>
TW_NOINLINE void sum_over_keys(const PairMask& mask, const Terms<E>& terms, bool finite, Acc<E>* c,
                               int64_t ld) {
#if defined(TW_HAS_TILES)
  if constexpr (kTiled<E>) return tiled::sum_over_keys(mask, terms, finite, c, ld);
#endif
  constexpr int kW = kGradWidth<E>;
  for (int t = 0; t < terms.count; t++) {
    const E *weights = terms.of[t].weights, *rows = terms.of[t].rows;
    if (!mask.whole && !finite) {
      for (int q = 0; q < mask.rows(); q++)
        add_seen<E>(
            mask.keys(), [&](int j) { return mask.sees(j, q); },
            [&](int j) { return weights + j / kFold<E> * kGradQueries + q; },
            [&](int j, int64_t d) { return rows + j / kFold<E> * ld + d; }, c + q * ld, ld);
      continue;
    }
    for (int64_t d = 0; d < ld; d += kW)
      for (int q = 0; q < mask.rows(); q += kGradRows) {
        const int count = std::min(kGradRows, mask.rows() - q);
        int ja, jb;
        mask.keys_of(q, q + count, &ja, &jb);
        const int first = ja / kFold<E>;
        add_product<E, true>(count, static_cast<int>(std::min<int64_t>(kW, ld - d)),
                             weights + first * kGradQueries + q, kGradQueries,
                             rows + first * ld + d, ld, elements_of<E>(jb - ja), c + q * ld + d,
                             ld);
      }
  }
}

#include "simd/end.hpp"
