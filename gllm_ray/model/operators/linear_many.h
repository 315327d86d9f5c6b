// A linear layer for many rows: the lanes of a vector hold output columns.
//
// The weight becomes floats, and columns lie side by side, one panel at a time; so a tile of
// outputs stays in registers over the whole depth, as in Goto and van de Geijn (2008).

#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "linear_problem.h"

namespace {

constexpr int64_t kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;  // columns
constexpr int64_t kTileRows = (kNumRegisters - 4) / kPanelVectors;

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

// packed[k][i] = from[i][k] for `count` rows of `depth` values; zeros up to `Vectors` vectors.
template <int64_t Vectors, typename V>
void pack(const V* from, int64_t count, int64_t depth, float* packed) {
  for (int64_t first = 0; first < Vectors * kLanes; first += kLanes) {
    const V* rows = from + first * depth;
    const int64_t num_rows = std::clamp<int64_t>(count - first, 0, kLanes);
    float* to = packed + first;
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      Vec block[kLanes] = {};
      for (int64_t i = 0; i < num_rows; ++i) block[i] = load(rows + i * depth + k);
      transpose(block);
      for (int64_t i = 0; i < kLanes; ++i) store(to + (k + i) * Vectors * kLanes, block[i]);
    }
    for (; k < depth; ++k)
      for (int64_t i = 0; i < kLanes; ++i)
        to[k * Vectors * kLanes + i] = i < num_rows ? static_cast<float>(rows[i * depth + k]) : 0;
  }
}

// A panel of columns, packed, with what its sums are multiplied by and added to.
struct Panel {
  const float* weight;  // [depth][kPanel]
  float scales[kPanel], bias[kPanel];
  int64_t column, count;
};

template <typename T, typename W>
Panel pack_panel(const Problem<T, W>& problem, int64_t column, float* packed) {
  Panel panel{packed, {}, {}, column, std::min(kPanel, problem.columns - column)};
  pack<kPanelVectors>(problem.weight + column * problem.depth, panel.count, problem.depth, packed);
  for (int64_t j = 0; j < panel.count; ++j) {
    panel.scales[j] = problem.scales ? problem.scales[column + j] : 1;
    panel.bias[j] = problem.bias ? static_cast<float>(problem.bias[column + j]) : 0;
  }
  return panel;
}

// Up to `kTileRows` rows from `row` on, whose packed input is `tile`, by the columns of a panel.
template <typename T, typename W>
void multiply(const Problem<T, W>& problem, const Panel& panel, const float* tile, int64_t row) {
  Vec sums[kTileRows][kPanelVectors] = {};
  for (int64_t k = 0; k < problem.depth; ++k) {
    Vec weight[kPanelVectors];
    for (int64_t v = 0; v < kPanelVectors; ++v)
      weight[v] = load(panel.weight + k * kPanel + v * kLanes);
    for (int64_t i = 0; i < kTileRows; ++i) {
      const float value = tile[k * kLanes + i];
      for (int64_t v = 0; v < kPanelVectors; ++v) sums[i][v] += value * weight[v];
    }
  }
  const int64_t num_rows = std::min(kTileRows, problem.rows - row);
  for (int64_t i = 0; i < num_rows; ++i) {
    T* to = problem.output + (row + i) * problem.columns + panel.column;
    T totals[kPanel];
    T* whole = panel.count == kPanel ? to : totals;
    for (int64_t v = 0; v < kPanelVectors; ++v)
      store(whole + v * kLanes,
            sums[i][v] * load(panel.scales + v * kLanes) + load(panel.bias + v * kLanes));
    if (whole == totals) std::copy_n(totals, panel.count, to);
  }
}

template <typename T, typename W>
void run_many(const Problem<T, W>& problem) {
  static_assert(kTileRows <= kLanes);
  const int64_t depth = problem.depth;
  const int64_t num_tiles = round_up(problem.rows, kTileRows) / kTileRows;
  static thread_local std::vector<float> input_buffer;
  float* tiles = aligned(input_buffer, num_tiles * depth * kLanes);
  torch::stable::parallel_for(0, num_tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile * kTileRows;
      pack<1>(problem.input + row * depth, std::min(kTileRows, problem.rows - row), depth,
              tiles + tile * depth * kLanes);
    }
  });
  const int64_t num_panels = round_up(problem.columns, kPanel) / kPanel;
  torch::stable::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> weight_buffer;
    float* packed = aligned(weight_buffer, depth * kPanel);
    for (int64_t index = begin; index < end; ++index) {
      const Panel panel = pack_panel(problem, index * kPanel, packed);
      for (int64_t tile = 0; tile < num_tiles; ++tile)
        multiply(problem, panel, tiles + tile * depth * kLanes, tile * kTileRows);
    }
  });
}

}  // namespace
