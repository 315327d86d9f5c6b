// A linear layer: output = input @ weight^T + bias, accumulated in float.
//
// Libraries pack the weight at each call, which costs more than it gains for a few rows, and
// multiply bfloat16 slowly where the CPU has no instructions for it. int8 weights have a scale for
// each output column.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "linear_few.h"
#include "linear_many.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// From which on packing pays.
constexpr int64_t kManyRows = 64;

template <typename T, typename W>
void run(Tensor& output, const Tensor& input, const Tensor& weight,
         const std::optional<Tensor>& scales, const std::optional<Tensor>& bias) {
  const Problem<T, W> problem{
      static_cast<const T*>(input.const_data_ptr()),
      static_cast<const W*>(weight.const_data_ptr()),
      scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr,
      bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
      static_cast<T*>(output.mutable_data_ptr()),
      input.size(0),
      input.size(1),
      weight.size(0)};
  if (problem.rows == 0) return;
  problem.rows < kManyRows ? run_few(problem) : run_many(problem);
}

template <typename T>
void run_as(Tensor& output, const Tensor& input, const Tensor& weight,
            const std::optional<Tensor>& scales, const std::optional<Tensor>& bias) {
  if (weight.scalar_type() == input.scalar_type()) {
    STD_TORCH_CHECK(!scales, "only int8 weights have scales");
    return run<T, T>(output, input, weight, scales, bias);
  }
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && scales &&
                      scales->scalar_type() == ScalarType::Float && scales->is_contiguous() &&
                      scales->numel() == weight.size(0),
                  "weight must have the input's type, or be int8 with a scale for each column");
  run<T, int8_t>(output, input, weight, scales, bias);
}

void linear(Tensor output, const Tensor& input, const Tensor& weight, std::optional<Tensor> scales,
            std::optional<Tensor> bias) {
  STD_TORCH_CHECK(input.dim() == 2 && input.size(1) == weight.size(1) && input.is_contiguous() &&
                      weight.is_contiguous() && output.is_contiguous(),
                  "input must be [rows, depth], and everything contiguous");
  STD_TORCH_CHECK(output.scalar_type() == input.scalar_type() &&
                      (!bias || bias->scalar_type() == input.scalar_type()),
                  "input, bias and output must have one type");
  if (input.scalar_type() == ScalarType::Float)
    run_as<float>(output, input, weight, scales, bias);
  else if (input.scalar_type() == ScalarType::BFloat16)
    run_as<BFloat16>(output, input, weight, scales, bias);
  else
    STD_TORCH_CHECK(false, "input must be float32 or bfloat16");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gllm_ray, library) {
  library.def(
      "linear(Tensor(a!) output, Tensor input, Tensor weight, Tensor? scales, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gllm_ray, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
}
