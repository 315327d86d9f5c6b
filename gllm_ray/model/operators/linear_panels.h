// Matrices laid out for the multiplication: what one step of it reads lies side by side.

#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

namespace {

constexpr int64_t kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;  // output columns

// Of lanes `i` and `i ^ Step` of two vectors, those that belong to the first or to the second.
template <int64_t Step, bool IsSecond, std::size_t... Lane>
Vec exchanged(Vec a, Vec b, std::index_sequence<Lane...>) {
  constexpr auto from = [](int64_t lane) {
    if (IsSecond) return (lane & Step) ? kLanes + lane : lane + Step;
    return (lane & Step) ? kLanes + lane - Step : lane;
  };
#ifdef __clang__
  return __builtin_shufflevector(a, b, from(Lane)...);
#else
  return __builtin_shuffle(a, b, IntVec{static_cast<int32_t>(from(Lane))...});
#endif
}

template <int64_t Step = 1>
void transpose(Vec* rows) {
  if constexpr (Step < kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      if (i & Step) continue;
      const Vec a = rows[i], b = rows[i + Step];
      rows[i] = exchanged<Step, false>(a, b, std::make_index_sequence<kLanes>());
      rows[i + Step] = exchanged<Step, true>(a, b, std::make_index_sequence<kLanes>());
    }
    transpose<2 * Step>(rows);
  }
}

// packed[k][i] = from[i][k] for `count` rows of `depth` values; zeros up to `Vectors` vectors. Pairs
// stay pairs, in the memory of a float each; the rest become floats.
template <int64_t Vectors, typename V>
void pack_rows(const V* from, int64_t count, int64_t depth, float* packed) {
  for (int64_t first = 0; first < Vectors * kLanes; first += kLanes) {
    const V* rows = from + first * depth;
    const int64_t num_rows = std::clamp<int64_t>(count - first, 0, kLanes);
    float* to = packed + first;
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      Vec block[kLanes] = {};
      for (int64_t i = 0; i < num_rows; ++i) {
        block[i] = load(rows + i * depth + k);
        __builtin_prefetch(rows + (i + Vectors * kLanes) * depth + k, 0, 2);
      }
      transpose(block);
      for (int64_t i = 0; i < kLanes; ++i) store(to + (k + i) * Vectors * kLanes, block[i]);
    }
    for (; k < depth; ++k)
      for (int64_t i = 0; i < kLanes; ++i)
        to[k * Vectors * kLanes + i] = i < num_rows ? to_lane(rows[i * depth + k]) : 0;
  }
}

// panels[p][k][j] = weight[p * kPanel + j][k]; zeros beyond the last column.
template <typename W>
void pack_panels(const W* weight, int64_t columns, int64_t depth, W* panels) {
  const int64_t num_panels = round_up(columns, kPanel) / kPanel;
  for (int64_t panel = 0; panel < num_panels; ++panel, panels += depth * kPanel) {
    const int64_t count = std::min(kPanel, columns - panel * kPanel);
    const W* rows = weight + panel * kPanel * depth;
    if constexpr (kIsMultiplied<W>) {
      pack_rows<kPanelVectors>(rows, count, depth, reinterpret_cast<float*>(panels));
      continue;
    }
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < kPanel; ++j)
        panels[k * kPanel + j] = j < count ? rows[j * depth + k] : W{};
  }
}

}  // namespace
