// Paged attention on CPU: a packed batch of prefill chunks and decodes attends to the KV cache.
//
// The query heads that share a KV head are rows of one problem, so keys and values are read once
// for all of them. Softmax is online (Milakov and Gimelshein, 2018), over chunks of keys, in
// float. A task is one KV head and some rows of one sequence. Few rows (a decode) put the width of
// a head into the lanes of a vector; many rows (a prefill chunk) put the rows there, and round
// their probabilities to bfloat16 where that is the caches' type and the CPU multiplies pairs.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attend_few.h"
#include "attend_many.h"

namespace {

using torch::stable::Tensor;

template <typename T>
void attend(const Problem& problem, HeadTask current, const HeadTask* next, Workspace& workspace) {
  const auto& [of_heads, kv_head] = current;
  const Task& task = *of_heads;
  if (task.num_rows <= kFewRows) return attend_few<T>(problem, current, next, workspace);
  switch ((task.num_rows + kLanes - 1) / kLanes) {
    case 1: return attend_many<1, T>(problem, task, kv_head, workspace);
    case 2: return attend_many<2, T>(problem, task, kv_head, workspace);
#ifdef __AVX512F__
    case 3: return attend_many<3, T>(problem, task, kv_head, workspace);
    case 4: return attend_many<4, T>(problem, task, kv_head, workspace);
#endif
  }
}

std::vector<Task> find_tasks(const Tensor& row_starts, const Tensor& context_lens,
                             const Tensor& block_tables, int64_t group) {
  const auto* starts = static_cast<const int64_t*>(row_starts.const_data_ptr());
  const auto* lengths = static_cast<const int64_t*>(context_lens.const_data_ptr());
  const auto* tables = static_cast<const int64_t*>(block_tables.const_data_ptr());
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < context_lens.size(0); ++sequence) {
    const int64_t num_tokens = starts[sequence + 1] - starts[sequence];
    constexpr int64_t kMostRows = kMaxVectors * kLanes;
    for (int64_t row = 0; row < num_tokens * group; row += kMostRows)
      tasks.push_back({tables + sequence * block_tables.size(1), starts[sequence],
                       lengths[sequence] - num_tokens, row,
                       std::min(kMostRows, num_tokens * group - row)});
  }
  return tasks;
}

template <typename T>
void run(const Problem& problem, const std::vector<Task>& tasks, int64_t num_kv_heads) {
  const int64_t num_tasks = static_cast<int64_t>(tasks.size()) * num_kv_heads;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Workspace workspace;
    auto at = [&](int64_t index) {
      return HeadTask{&tasks[index / num_kv_heads], index % num_kv_heads};
    };
    for (int64_t index = begin; index < end; ++index) {
      const HeadTask next = at(std::min(index + 1, end - 1));
      attend<T>(problem, at(index), index + 1 < end ? &next : nullptr, workspace);
    }
  });
}

void paged_attention(Tensor output, const Tensor& query, const Tensor& keys, const Tensor& values,
                     const Tensor& row_starts, const Tensor& context_lens,
                     const Tensor& block_tables, int64_t block_size, int64_t window, double scale,
                     double softcap, std::optional<Tensor> sinks) {
  STD_TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1 && keys.stride(2) == 1 &&
                      values.stride(2) == 1 && output.is_contiguous(),
                  "rows of query and caches, and the output must be contiguous");
  STD_TORCH_CHECK(query.scalar_type() == keys.scalar_type() &&
                      query.scalar_type() == values.scalar_type() &&
                      query.scalar_type() == output.scalar_type(),
                  "query, caches and output must have one type");
  const int64_t num_kv_heads = keys.size(0);
  const Problem problem{
      query.const_data_ptr(),
      keys.const_data_ptr(),
      values.const_data_ptr(),
      output.mutable_data_ptr(),
      sinks ? static_cast<const float*>(sinks->const_data_ptr()) : nullptr,
      query.size(0),
      query.size(0) / num_kv_heads,
      keys.size(2),
      values.size(2),
      block_size,
      query.stride(0),
      query.stride(1),
      keys.stride(0),
      keys.stride(1),
      values.stride(0),
      values.stride(1),
      window,
      static_cast<float>(scale),
      static_cast<float>(softcap),
  };
  const auto tasks = find_tasks(row_starts, context_lens, block_tables, problem.group);
  using torch::headeronly::ScalarType;
  if (query.scalar_type() == ScalarType::Float)
    run<float>(problem, tasks, num_kv_heads);
  else if (query.scalar_type() == ScalarType::BFloat16)
    run<BFloat16>(problem, tasks, num_kv_heads);
  else
    STD_TORCH_CHECK(false, "query must be float32 or bfloat16");
}

void copy_to_slots(Tensor& cache, const Tensor& rows, const Tensor& slots) {
  STD_TORCH_CHECK(rows.dim() == 3 && rows.stride(2) == 1 && cache.stride(2) == 1,
                  "rows of both must be contiguous");
  STD_TORCH_CHECK(rows.scalar_type() == cache.scalar_type(), "rows and cache must have one type");
  const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  auto* to = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t value_bytes = cache.element_size(), row_bytes = cache.size(2) * value_bytes;
  for (int64_t head = 0; head < cache.size(0); ++head)
    for (int64_t row = 0; row < slots.size(0); ++row) {
      const int64_t target = head * cache.stride(0) + slot[row] * cache.stride(1);
      const int64_t source = head * rows.stride(0) + row * rows.stride(1);
      std::memcpy(to + target * value_bytes, from + source * value_bytes, row_bytes);
    }
}

void write_kv(Tensor keys, Tensor values, const Tensor& slots, const Tensor& new_keys,
              const Tensor& new_values) {
  copy_to_slots(keys, new_keys, slots);
  copy_to_slots(values, new_values, slots);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gllm_ray, library) {
  library.def(
      "write_kv(Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor new_keys, "
      "Tensor new_values) -> ()");
  library.def(
      "paged_attention(Tensor(a!) output, Tensor query, Tensor keys, Tensor values, "
      "Tensor row_starts, Tensor context_lens, Tensor block_tables, int block_size, int window, "
      "float scale, float softcap, Tensor? sinks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gllm_ray, CPU, library) {
  library.impl("write_kv", TORCH_BOX(&write_kv));
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
}
