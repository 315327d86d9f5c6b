// A linear layer for few rows: output = input @ weight^T + bias, accumulated in float.
//
// Libraries pack the weight at each call, which costs more than it gains for a few rows. Here each
// panel of output columns meets all rows while it is in the cache, and the next one is fetched. A
// sum runs in the same order whatever the number of rows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kColumns = 4;  // of a panel
constexpr int64_t kRows = (kNumRegisters - 8) / kColumns;  // so that a tile's sums fit
constexpr int64_t kReusingRows = 4;  // up to which a weight is not worth a copy as floats
constexpr int64_t kMinTaskSize = 16384;  // products

template <typename T>
struct Problem {
  const float* input;  // [rows, depth]
  const T* weight;     // [columns, depth]
  const T* bias;       // [columns], or null
  T* output;           // [rows, columns]
  int64_t rows, depth, columns;
};

// Output columns `column` to `column + Columns` of `Rows` rows.
template <int64_t Rows, int64_t Columns, bool Prefetch, typename T, typename W>
void tile(const Problem<T>& problem, const W* weight, int64_t row, int64_t column) {
  const int64_t depth = problem.depth;
  const float* input = problem.input + row * depth;
  Vec sums[Rows][Columns] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec factors[Columns];
    for (int64_t j = 0; j < Columns; ++j) {
      factors[j] = load(weight + j * depth + k);
      if (Prefetch) __builtin_prefetch(weight + (Columns + j) * depth + k);
    }
    for (int64_t i = 0; i < Rows; ++i) {
      const Vec values = load(input + i * depth + k);
      for (int64_t j = 0; j < Columns; ++j) sums[i][j] += values * factors[j];
    }
  }
  for (int64_t i = 0; i < Rows; ++i)
    for (int64_t j = 0; j < Columns; ++j) {
      float total = sum(sums[i][j]);
      for (int64_t rest = k; rest < depth; ++rest)
        total += input[i * depth + rest] * static_cast<float>(weight[j * depth + rest]);
      if (problem.bias) total += static_cast<float>(problem.bias[column + j]);
      problem.output[(row + i) * problem.columns + column + j] = static_cast<T>(total);
    }
}

// Calls `tile` for the largest number of rows up to `rows`, which the compiler must know.
template <int64_t Rows, int64_t Columns, bool Prefetch, typename T, typename W>
int64_t largest_tile(const Problem<T>& problem, const W* weight, int64_t row, int64_t column) {
  if constexpr (Rows > 1)
    if (problem.rows - row < Rows)
      return largest_tile<Rows - 1, Columns, Prefetch>(problem, weight, row, column);
  tile<Rows, Columns, Prefetch>(problem, weight, row, column);
  return row + Rows;
}

template <int64_t Columns, typename T>
void panel(const Problem<T>& problem, int64_t column, float* converted) {
  const T* weight = problem.weight + column * problem.depth;
  if (!std::is_same_v<T, float> && problem.rows > kReusingRows) {
    // What is used by many rows is converted once.
    const int64_t size = Columns * problem.depth;
    int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) {
      store(converted + at, load(weight + at));
      __builtin_prefetch(weight + size + at);
    }
    for (; at < size; ++at) converted[at] = static_cast<float>(weight[at]);
    for (int64_t row = 0; row < problem.rows;)
      row = largest_tile<kRows, Columns, false>(problem, converted, row, column);
    return;
  }
  int64_t row = largest_tile<kRows, Columns, true>(problem, weight, 0, column);
  while (row < problem.rows)
    row = largest_tile<kRows, Columns, false>(problem, weight, row, column);
}

template <typename T>
void run(const Problem<T>& problem) {
  const int64_t num_panels = round_up(problem.columns, kColumns) / kColumns;
  const int64_t panel_size = kColumns * problem.rows * problem.depth;
  const int64_t grain = std::max<int64_t>(1, kMinTaskSize / std::max<int64_t>(1, panel_size));
  torch::stable::parallel_for(0, num_panels, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> converted(std::is_same_v<T, float> ? 0 : kColumns * problem.depth);
    for (int64_t index = begin; index < end; ++index) {
      int64_t column = index * kColumns;
      if (column + kColumns <= problem.columns)
        panel<kColumns>(problem, column, converted.data());
      else
        for (; column < problem.columns; ++column) panel<1>(problem, column, converted.data());
    }
  });
}

template <typename T>
void run_as(Tensor& output, const Tensor& input, const Tensor& weight,
            const std::optional<Tensor>& bias) {
  Problem<T> problem{nullptr,
                     static_cast<const T*>(weight.const_data_ptr()),
                     bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
                     static_cast<T*>(output.mutable_data_ptr()),
                     input.size(0),
                     input.size(1),
                     weight.size(0)};
  if (problem.rows == 0) return;
  std::vector<float> converted;
  if constexpr (std::is_same_v<T, float>) {
    problem.input = static_cast<const float*>(input.const_data_ptr());
  } else {
    const auto* from = static_cast<const T*>(input.const_data_ptr());
    converted.assign(from, from + problem.rows * problem.depth);
    problem.input = converted.data();
  }
  run(problem);
}

void linear(Tensor output, const Tensor& input, const Tensor& weight, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(input.dim() == 2 && input.size(1) == weight.size(1) && input.is_contiguous() &&
                      weight.is_contiguous() && output.is_contiguous(),
                  "input must be [rows, depth], and everything contiguous");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type() &&
                      output.scalar_type() == weight.scalar_type(),
                  "input, weight and output must have one type");
  using torch::headeronly::ScalarType;
  if (weight.scalar_type() == ScalarType::Float)
    run_as<float>(output, input, weight, bias);
  else if (weight.scalar_type() == ScalarType::BFloat16)
    run_as<BFloat16>(output, input, weight, bias);
  else
    STD_TORCH_CHECK(false, "weight must be float32 or bfloat16");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gllm_ray, library) {
  library.def("linear(Tensor(a!) output, Tensor input, Tensor weight, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gllm_ray, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
}
