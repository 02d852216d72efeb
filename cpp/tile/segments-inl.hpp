// What products of a panel and a tile of keys are told: factors, and which pairs are seen.
#pragma once
#include "math/softmax_state-inl.hpp"
#include "tile/pack-inl.hpp"

#include "simd/begin.hpp"

// A run of keys [ja, jb) of a tile seen by the panel's groups [na, nb). `edge`: some pairs in it
// are masked.
struct Segment {
  int ja, jb, na, nb;
  bool edge;
};

// The lanes of register n of a panel that see key j: `words` holds kPanelGroups words of 16 lanes a
// key.
template <class T>
TW_INLINE Lanes<T> edge_lanes(const uint16_t* words, int j, int n) {
  const int lane = n * kWidth<T>;
  return lanes<T>(
      static_cast<uint32_t>(words[j * kPanelGroups + lane / kGroup] >> (lane % kGroup)) &
      ((1u << kWidth<T>)-1));
}

// `a` is the tile's first key, `b` the panel.
template <class E>
struct Factor {
  const E* a;
  int64_t lda;
  const E* b;
};

// The tile's segments; `finite`: no hidden value is NaN or infinite, which matters to pairs.
struct Run {
  const uint16_t* words;
  const Segment* segments;
  int count;
  bool finite;
};

#include "simd/end.hpp"
