// A linear layer for few rows: the lanes of a vector hold parts of a sum.
//
// Each panel of output columns meets all rows while it is in the cache, and the next one is
// fetched. A sum runs in the same order whatever the number of rows.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "linear_problem.h"

namespace {

constexpr int64_t kColumns = 4;  // of a panel
constexpr int64_t kRows = (kNumRegisters - 8) / kColumns;  // so that a tile's sums fit
constexpr int64_t kReusingRows = 4;  // up to which a weight is not worth a copy as floats
constexpr int64_t kMinTaskSize = 16384;  // products

// Output columns `column` to `column + Columns` of `Rows` rows, from rows of floats. `Fetched` pieces
// of what lies at `next` are fetched meanwhile, with each vector.
template <int64_t Rows, int64_t Columns, int64_t Fetched, typename T, typename W, typename V>
void tile(const Problem<T, W>& problem, const float* rows, const V* weight, int64_t row,
          int64_t column, const char* next) {
  const int64_t depth = problem.depth;
  const float* input = rows + row * depth;
  Vec sums[Rows][Columns] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec factors[Columns];
    for (int64_t j = 0; j < Columns; ++j) factors[j] = load(weight + j * depth + k);
    for (int64_t piece = 0; piece < Fetched; ++piece, next += sizeof(Vec))
      __builtin_prefetch(next);
    for (int64_t i = 0; i < Rows; ++i) {
      const Vec values = load(input + i * depth + k);
      for (int64_t j = 0; j < Columns; ++j) sums[i][j] += values * factors[j];
    }
  }
  for (int64_t i = 0; i < Rows; ++i) {
    float totals[Columns];
    add_lanes<Columns>(sums[i], totals);
    for (int64_t j = 0; j < Columns; ++j) {
      for (int64_t rest = k; rest < depth; ++rest)
        totals[j] += input[i * depth + rest] * static_cast<float>(weight[j * depth + rest]);
      if (problem.scales) totals[j] *= problem.scales[column + j];
      if (problem.bias) totals[j] += static_cast<float>(problem.bias[column + j]);
      problem.output[(row + i) * problem.columns + column + j] = static_cast<T>(totals[j]);
    }
  }
}

// Calls `tile` for the largest number of rows up to `Rows`, which the compiler must know.
template <int64_t Rows, int64_t Columns, int64_t Fetched, typename T, typename W, typename V>
int64_t largest_tile(const Problem<T, W>& problem, const float* rows, const V* weight, int64_t row,
                     int64_t column, const char* next) {
  if constexpr (Rows > 1)
    if (problem.rows - row < Rows)
      return largest_tile<Rows - 1, Columns, Fetched>(problem, rows, weight, row, column, next);
  tile<Rows, Columns, Fetched>(problem, rows, weight, row, column, next);
  return row + Rows;
}

template <int64_t Columns, typename T, typename W>
void panel(const Problem<T, W>& problem, const float* rows, int64_t column, float* converted) {
  const int64_t size = Columns * problem.depth;
  const W* weight = problem.weight + column * problem.depth;
  const char* next = reinterpret_cast<const char*>(weight + size);
  if (std::is_same_v<W, float> || problem.rows <= kReusingRows) {
    int64_t row =
        largest_tile<kRows, Columns, Columns * sizeof(W) / 4>(problem, rows, weight, 0, column, next);
    while (row < problem.rows)
      row = largest_tile<kRows, Columns, 0>(problem, rows, weight, row, column, next);
    return;
  }
  // What is used by many rows is converted once. The next panel comes in little by little.
  to_floats(converted, weight, size);
  const char* end = next + size * sizeof(W);
  for (int64_t row = 0; row < problem.rows; next += 4 * problem.depth)
    row = next < end
              ? largest_tile<kRows, Columns, 1>(problem, rows, converted, row, column, next)
              : largest_tile<kRows, Columns, 0>(problem, rows, converted, row, column, next);
}

// The input as floats, in a buffer if it has to be converted.
template <typename T, typename W>
const float* float_rows(const Problem<T, W>& problem, std::vector<float>& buffer) {
  if constexpr (std::is_same_v<T, float>) {
    return problem.input;
  } else {
    float* rows = aligned(buffer, problem.rows * problem.depth);
    to_floats(rows, problem.input, problem.rows * problem.depth);
    return rows;
  }
}

template <typename T, typename W>
void run_few(const Problem<T, W>& problem) {
  static thread_local std::vector<float> buffer;
  const float* rows = float_rows(problem, buffer);
  const int64_t num_panels = round_up(problem.columns, kColumns) / kColumns;
  const int64_t panel_size = std::max<int64_t>(1, kColumns * problem.rows * problem.depth);
  const int64_t grain = std::max<int64_t>(1, kMinTaskSize / panel_size);
  torch::stable::parallel_for(0, num_panels, grain, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> weight_buffer;
    float* converted =
        aligned(weight_buffer, std::is_same_v<W, float> ? 0 : kColumns * problem.depth);
    for (int64_t index = begin; index < end; ++index) {
      int64_t column = index * kColumns;
      if (column + kColumns <= problem.columns)
        panel<kColumns>(problem, rows, column, converted);
      else
        for (; column < problem.columns; ++column) panel<1>(problem, rows, column, converted);
    }
  });
}

}  // namespace
