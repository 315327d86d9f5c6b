// What a decoder layer computes between its linear layers and its attention, each in one pass.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMinTaskValues = 16384;

// Calls `body` with a value of the tensor's type.
template <typename Body>
void for_type(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Float)
    body(float());
  else if (tensor.scalar_type() == ScalarType::BFloat16)
    body(BFloat16());
  else
    STD_TORCH_CHECK(false, "input must be float32 or bfloat16");
}

template <typename T>
void normalize(const T* from, const T* weight, int64_t width, float epsilon, T* to) {
  Vec squares = {};
  float rest = 0;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) squares += load(from + d) * load(from + d);
  for (; d < width; ++d) rest += static_cast<float>(from[d]) * static_cast<float>(from[d]);
  const float factor = 1 / std::sqrt((sum(squares) + rest) / width + epsilon);
  for (d = 0; d + kLanes <= width; d += kLanes)
    store(to + d, load(from + d) * factor * load(weight + d));
  for (; d < width; ++d)
    to[d] = static_cast<T>(static_cast<float>(from[d]) * factor * static_cast<float>(weight[d]));
}

void rms_norm(Tensor output, const Tensor& input, const Tensor& weight, double epsilon) {
  const int64_t width = weight.numel(), rows = input.numel() / std::max<int64_t>(width, 1);
  STD_TORCH_CHECK(input.is_contiguous() && weight.is_contiguous() && output.is_contiguous() &&
                      output.numel() == rows * width && input.numel() == rows * width,
                  "input and output must be contiguous rows as wide as weight");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type() &&
                      input.scalar_type() == output.scalar_type(),
                  "input, weight and output must have one type");
  for_type(input, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(input.const_data_ptr());
    const auto* factors = static_cast<const T*>(weight.const_data_ptr());
    auto* to = static_cast<T*>(output.mutable_data_ptr());
    const int64_t grain = kMinTaskValues / (width + 1) + 1;
    torch::stable::parallel_for(0, rows, grain, [&](int64_t row, int64_t end) {
      for (; row < end; ++row)
        normalize(from + row * width, factors, width, static_cast<float>(epsilon),
                  to + row * width);
    });
  });
}

// Turns the pairs (d, d + half) of a head by the angles of its token.
template <typename T>
void rotate_head(const T* from, const T* cosines, const T* sines, int64_t half, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const Vec a = load(from + d), b = load(from + half + d);
    store(to + d, a * load(cosines + d) - b * load(sines + d));
    store(to + half + d, b * load(cosines + half + d) + a * load(sines + half + d));
  }
  for (; d < half; ++d) {
    const float a = from[d], b = from[half + d];
    to[d] = static_cast<T>(a * static_cast<float>(cosines[d]) - b * static_cast<float>(sines[d]));
    to[half + d] = static_cast<T>(b * static_cast<float>(cosines[half + d]) +
                                  a * static_cast<float>(sines[half + d]));
  }
}

void rotate(Tensor output, const Tensor& input, const Tensor& cosines, const Tensor& sines) {
  STD_TORCH_CHECK(input.dim() == 3 && input.stride(2) == 1 && output.is_contiguous() &&
                      output.size(0) == input.size(0) && output.size(1) == input.size(1) &&
                      output.size(2) == input.size(2) && input.size(2) % 2 == 0,
                  "input and output must be [tokens, heads, width], with rows in one piece");
  for (const Tensor& angles : {cosines, sines})
    STD_TORCH_CHECK(angles.dim() == 2 && angles.size(0) == input.size(0) &&
                        angles.size(1) == input.size(2) && angles.is_contiguous() &&
                        angles.scalar_type() == input.scalar_type(),
                    "cosines and sines must be [tokens, width], contiguous, of the input's type");
  STD_TORCH_CHECK(output.scalar_type() == input.scalar_type(), "output must have the input's type");
  const int64_t heads = input.size(1), width = input.size(2);
  const int64_t token_stride = input.stride(0), head_stride = input.stride(1);
  for_type(input, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(input.const_data_ptr());
    const auto* cos = static_cast<const T*>(cosines.const_data_ptr());
    const auto* sin = static_cast<const T*>(sines.const_data_ptr());
    auto* to = static_cast<T*>(output.mutable_data_ptr());
    const int64_t grain = kMinTaskValues / (heads * width + 1) + 1;
    torch::stable::parallel_for(0, input.size(0), grain, [&](int64_t token, int64_t end) {
      for (; token < end; ++token)
        for (int64_t head = 0; head < heads; ++head)
          rotate_head(from + token * token_stride + head * head_stride, cos + token * width,
                      sin + token * width, width / 2, to + (token * heads + head) * width);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gllm_ray, library) {
  library.def("rms_norm(Tensor(a!) output, Tensor input, Tensor weight, float epsilon) -> ()");
  library.def("rotate(Tensor(a!) output, Tensor input, Tensor cosines, Tensor sines) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gllm_ray, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rotate", TORCH_BOX(&rotate));
}
