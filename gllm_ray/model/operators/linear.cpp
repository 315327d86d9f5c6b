// A linear layer: output = input @ weight^T + bias, accumulated in float; gated, the product is
// multiplied by silu(output), of what the output held.
//
// Libraries pack the weight at each call, which costs more than it gains for a few rows, and
// multiply bfloat16 slowly where the CPU has no instructions for it. Here the weight may be packed
// once for all calls. int8 weights have a scale for each output column.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "linear_tiles.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_in_pairs(const Tensor& weight, int64_t depth) {
  return kHasPairs && weight.scalar_type() == ScalarType::BFloat16 && depth % 2 == 0;
}

template <typename T, typename V, typename W>
void run_as(Tensor& output, const Tensor& input, const Tensor& weight,
            const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, bool is_gated) {
  const Problem<T, V, W> problem{
      static_cast<const V*>(input.const_data_ptr()),
      static_cast<const W*>(weight.const_data_ptr()),
      scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr,
      bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
      static_cast<T*>(output.mutable_data_ptr()),
      input.size(0),
      input.size(1) / static_cast<int64_t>(sizeof(V) / sizeof(T)),
      output.size(1),
      weight.dim() > 2,
      is_gated};
  run(problem);
}

template <typename T>
void run_as(Tensor& output, const Tensor& input, const Tensor& weight,
            const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, bool is_gated) {
  if (weight.scalar_type() == input.scalar_type()) {
    STD_TORCH_CHECK(!scales, "only int8 weights have scales");
    if constexpr (kHasPairs && std::is_same_v<T, BFloat16>)
      if (is_in_pairs(weight, input.size(1)))
        return run_as<T, Pair, Pair>(output, input, weight, scales, bias, is_gated);
    return run_as<T, T, T>(output, input, weight, scales, bias, is_gated);
  }
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && scales &&
                      scales->scalar_type() == ScalarType::Float && scales->is_contiguous() &&
                      scales->numel() == output.size(1),
                  "weight must have the input's type, or be int8 with a scale for each column");
  run_as<T, T, int8_t>(output, input, weight, scales, bias, is_gated);
}

bool fits(const Tensor& weight, int64_t columns, int64_t depth) {
  if (weight.dim() == 2) return weight.size(0) == columns && weight.size(1) == depth;
  const int64_t together = is_in_pairs(weight, depth) ? 2 : 1;
  return weight.dim() == 4 && weight.size(0) == round_up(columns, kPanel) / kPanel &&
         weight.size(1) == depth / together && weight.size(2) == kPanel &&
         weight.size(3) == together;
}

void linear(Tensor output, const Tensor& input, const Tensor& weight, std::optional<Tensor> scales,
            std::optional<Tensor> bias, bool is_gated) {
  STD_TORCH_CHECK(input.dim() == 2 && output.dim() == 2 && output.size(0) == input.size(0) &&
                      fits(weight, output.size(1), input.size(1)),
                  "input must be [rows, depth], output [rows, columns] and weight [columns, depth] "
                  "or what `pack_linear` makes of it");
  STD_TORCH_CHECK(input.is_contiguous() && weight.is_contiguous() && output.is_contiguous(),
                  "input, weight and output must be contiguous");
  STD_TORCH_CHECK(output.scalar_type() == input.scalar_type() &&
                      (!bias || bias->scalar_type() == input.scalar_type()),
                  "input, bias and output must have one type");
  if (input.scalar_type() == ScalarType::Float)
    run_as<float>(output, input, weight, scales, bias, is_gated);
  else if (input.scalar_type() == ScalarType::BFloat16)
    run_as<BFloat16>(output, input, weight, scales, bias, is_gated);
  else
    STD_TORCH_CHECK(false, "input must be float32 or bfloat16");
}

// As `linear` without bias, with a weight for each group of rows; group i ends at row `row_ends[i]`.
void grouped_linear(Tensor output, Tensor input, const Tensor& weights, const Tensor& row_ends) {
  STD_TORCH_CHECK(row_ends.scalar_type() == ScalarType::Long && row_ends.is_contiguous() &&
                      row_ends.numel() == weights.size(0),
                  "row_ends must be int64, one for each weight");
  const auto* ends = static_cast<const int64_t*>(row_ends.const_data_ptr());
  int64_t begin = 0;
  for (int64_t group = 0; group < weights.size(0); begin = ends[group++]) {
    const int64_t count = ends[group] - begin;
    STD_TORCH_CHECK(count >= 0 && ends[group] <= input.size(0), "row_ends must rise up to the rows");
    if (count == 0) continue;
    linear(torch::stable::narrow(output, 0, begin, count),
           torch::stable::narrow(input, 0, begin, count), torch::stable::select(weights, 0, group),
           {}, {}, false);
  }
}

template <typename W>
void pack_as(const Tensor& weight, Tensor& panels) {
  pack_panels(static_cast<const W*>(weight.const_data_ptr()), weight.size(0), panels.size(1),
              static_cast<W*>(panels.mutable_data_ptr()));
}

// [columns, depth] as [panels, steps, kPanel, values of a step].
Tensor pack_linear(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(),
                  "weight must be [columns, depth] and contiguous");
  const int64_t depth = weight.size(1), together = is_in_pairs(weight, depth) ? 2 : 1;
  Tensor panels = torch::stable::new_empty(
      weight, {round_up(weight.size(0), kPanel) / kPanel, depth / together, kPanel, together});
  switch (weight.scalar_type()) {
    case ScalarType::Float: pack_as<float>(weight, panels); break;
    case ScalarType::BFloat16:
      together == 2 ? pack_as<Pair>(weight, panels) : pack_as<BFloat16>(weight, panels);
      break;
    case ScalarType::Char: pack_as<int8_t>(weight, panels); break;
    default: STD_TORCH_CHECK(false, "weight must be float32, bfloat16 or int8");
  }
  return panels;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gllm_ray, library) {
  library.def("pack_linear(Tensor weight) -> Tensor");
  library.def(
      "linear(Tensor(a!) output, Tensor input, Tensor weight, Tensor? scales, Tensor? bias, "
      "bool is_gated=False) -> ()");
  library.def(
      "grouped_linear(Tensor(a!) output, Tensor input, Tensor weights, Tensor row_ends) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gllm_ray, CPU, library) {
  library.impl("pack_linear", TORCH_BOX(&pack_linear));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("grouped_linear", TORCH_BOX(&grouped_linear));
}
