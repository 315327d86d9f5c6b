// The multiplication: tiles of outputs that stay in registers over the whole depth, as in Goto and
// van de Geijn (2008), where the lanes of a vector hold output columns.
//
// A panel of columns meets all tiles of a group of rows while it is in the cache, and the next
// panel is fetched meanwhile. A sum runs in the same order whatever the number of rows.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "linear_panels.h"

namespace {

constexpr int64_t kTileRows = (kNumRegisters - 4) / kPanelVectors;
constexpr int64_t kGroupBytes = 1 << 20;  // of packed rows, which stay in the second cache
constexpr int64_t kMinTaskSize = 16384;   // products
constexpr int64_t kCacheLine = 64;
static_assert(kTileRows <= kLanes);

// `V` and `W` are both `Pair`, two bfloat16 a step, or neither is.
template <typename T, typename V, typename W>
struct Problem {
  const V* input;       // [rows, depth]
  const W* weight;      // [columns, depth], or panels of it
  const float* scales;  // [columns] by which the weight's rows are multiplied, or null
  const T* bias;        // [columns], or null
  T* output;            // [rows, columns]
  int64_t rows, depth, columns;
  bool is_packed;
  bool is_gated;  // output = silu(what it held) * the product
};

// A share of what is needed next, to be fetched little by little.
struct Fetch {
  const char* at;
  int64_t step;
};

// sums[i][j] = sum_k tile[k][i] * panel[k][j]; keeps the panel as it is multiplied in `kept`, if
// that is given and the panel is of another type.
template <int64_t Rows, typename V, typename W>
void multiply_tile(const float* tile, const W* panel, int64_t depth, Fetch fetch, float* kept,
                   float* sums) {
  constexpr int64_t kStepLines = std::max<int64_t>(1, kPanel * sizeof(W) / kCacheLine);
  Vec totals[Rows][kPanelVectors];
  // One by one, or GCC has `memset` clear them in memory, which takes 2 % of the whole.
#pragma GCC unroll 16
  for (int64_t i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int64_t v = 0; v < kPanelVectors; ++v) totals[i][v] = Vec{};
  for (int64_t k = 0; k < depth; ++k, fetch.at += fetch.step) {
    Vec weight[kPanelVectors];
    for (int64_t v = 0; v < kPanelVectors; ++v) weight[v] = load(panel + k * kPanel + v * kLanes);
    if (!kIsMultiplied<W> && kept)
      for (int64_t v = 0; v < kPanelVectors; ++v) store(kept + k * kPanel + v * kLanes, weight[v]);
    for (int64_t line = 0; line < kStepLines; ++line)
      __builtin_prefetch(fetch.at + line * kCacheLine, 0, 2);
    for (int64_t i = 0; i < Rows; ++i) {
      const Vec value = fill(tile[k * kLanes + i]);
      for (int64_t v = 0; v < kPanelVectors; ++v)
        totals[i][v] = multiply_add<V>(value, weight[v], totals[i][v]);
    }
  }
  for (int64_t i = 0; i < Rows; ++i)
    for (int64_t v = 0; v < kPanelVectors; ++v) store(sums + i * kPanel + v * kLanes, totals[i][v]);
}

// Calls `multiply_tile` with the number of rows, which the compiler must know.
template <int64_t Rows, typename V, typename W>
void multiply_rows(int64_t rows, const float* tile, const W* panel, int64_t depth, Fetch fetch,
                   float* kept, float* sums) {
  if constexpr (Rows > 1)
    if (rows < Rows) return multiply_rows<Rows - 1, V>(rows, tile, panel, depth, fetch, kept, sums);
  multiply_tile<Rows, V>(tile, panel, depth, fetch, kept, sums);
}

template <typename T, typename V, typename W>
void finish(const Problem<T, V, W>& problem, const float* sums, int64_t row, int64_t num_rows,
            int64_t column) {
  const int64_t count = std::min(kPanel, problem.columns - column);
  alignas(64) float scales[kPanel], bias[kPanel];
  for (int64_t j = 0; j < count; ++j) {
    scales[j] = problem.scales ? problem.scales[column + j] : 1;
    bias[j] = problem.bias ? static_cast<float>(problem.bias[column + j]) : 0;
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    T* to = problem.output + (row + i) * problem.columns + column;
    const float* from = sums + i * kPanel;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
      const Vec value = load(from + j) * load(scales + j) + load(bias + j);
      store(to + j, problem.is_gated ? silu(load(to + j)) * value : value);
    }
    for (; j < count; ++j) {
      const float value = from[j] * scales[j] + bias[j];
      to[j] = static_cast<T>(problem.is_gated ? silu(fill(to[j]))[0] * value : value);
    }
  }
}

// A panel of the weight by all rows, which are packed in `tiles`.
template <typename T, typename V, typename W>
void multiply_panel(const Problem<T, V, W>& problem, const float* tiles, int64_t num_tiles,
                    int64_t index, float* kept) {
  alignas(64) float sums[kTileRows * kPanel];
  const int64_t depth = problem.depth, column = index * kPanel;
  const W* panel = problem.weight + column * depth;
  const auto* next = reinterpret_cast<const char*>(panel + kPanel * depth);
  const int64_t step = problem.is_packed ? (kPanel * sizeof(W) + num_tiles - 1) / num_tiles : 0;
  if (!problem.is_packed)
    pack_rows<kPanelVectors>(panel, std::min(kPanel, problem.columns - column), depth, kept);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t row = tile * problem.rows / num_tiles;
    const int64_t num_rows = (tile + 1) * problem.rows / num_tiles - row;
    const Fetch fetch{next + tile * step * depth, step};
    const float* rows = tiles + tile * depth * kLanes;
    if (problem.is_packed && (kIsMultiplied<W> || tile == 0))
      multiply_rows<kTileRows, V>(num_rows, rows, panel, depth, fetch,
                                  num_tiles > 1 ? kept : nullptr, sums);
    else
      multiply_rows<kTileRows, V>(num_rows, rows, static_cast<const float*>(kept), depth, fetch,
                                  nullptr, sums);
    finish(problem, sums, row, num_rows, column);
  }
}

template <typename T, typename V, typename W>
void run_group(const Problem<T, V, W>& problem) {
  const int64_t depth = problem.depth;
  const int64_t num_tiles = round_up(problem.rows, kTileRows) / kTileRows;
  static thread_local std::vector<float> input_buffer;
  float* tiles = aligned(input_buffer, num_tiles * depth * kLanes);
  torch::stable::parallel_for(0, num_tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile * problem.rows / num_tiles;
      pack_rows<1>(problem.input + row * depth, (tile + 1) * problem.rows / num_tiles - row,
                   depth, tiles + tile * depth * kLanes);
    }
  });
  const int64_t num_panels = round_up(problem.columns, kPanel) / kPanel;
  const int64_t panel_products = std::max<int64_t>(1, kPanel * depth * problem.rows);
  const int64_t grain = std::max<int64_t>(1, kMinTaskSize / panel_products);
  torch::stable::parallel_for(0, num_panels, grain, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> weight_buffer;
    float* kept = aligned(weight_buffer, kPanel * depth);
    for (int64_t index = begin; index < end; ++index)
      multiply_panel(problem, tiles, num_tiles, index, kept);
  });
}

template <typename T, typename V, typename W>
void run(const Problem<T, V, W>& problem) {
  const int64_t tile_bytes = std::max<int64_t>(1, problem.depth * kLanes * sizeof(float));
  const int64_t most_rows = std::max<int64_t>(1, kGroupBytes / tile_bytes) * kTileRows;
  const int64_t num_groups = round_up(problem.rows, most_rows) / most_rows;
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t row = group * problem.rows / num_groups;
    Problem<T, V, W> part = problem;
    part.input += row * problem.depth;
    part.output += row * problem.columns;
    part.rows = (group + 1) * problem.rows / num_groups - row;
    run_group(part);
  }
}

}  // namespace
