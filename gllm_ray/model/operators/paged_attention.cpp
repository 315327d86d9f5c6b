// Paged attention on CPU: a packed batch of prefill chunks and decodes attends to the KV cache.
//
// The query heads that share a KV head are rows of one problem, so keys and values are read once
// for all of them. Softmax is online (Milakov and Gimelshein, 2018), over chunks of keys, in
// float. A task is one KV head and some rows of one sequence. Few rows (a decode) put the width of
// a head into the lanes of a vector; many rows (a prefill chunk) put the rows there.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "vectors.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kMaxVectors = kNumRegisters / 8;  // of rows; so kTile times as many sums fit
constexpr int64_t kTile = 4;       // keys, value columns or rows whose sums are in registers
constexpr int64_t kChunk = 64;     // keys between two updates of the softmax
constexpr int64_t kFewRows = 12;   // up to which the lanes hold a head's width
constexpr float kNegInf = -__builtin_inff();
constexpr float kLowest = -1e30f;  // a running maximum before the first key

// exp(x) to about one unit in the last place; 0 where it would be denormal.
inline Vec exponential(Vec x) {
  const Vec clamped = x < -87.0f ? fill(-87.0f) : (x > 88.0f ? fill(88.0f) : x);
  const Vec magic = fill(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const Vec n = (clamped * 1.44269504f + magic) - magic;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < -87.0f ? Vec{} : p * power;
}

inline Vec soft_cap(Vec score, float cap) {
  return cap * (1.0f - 2.0f / (exponential(score * (2.0f / cap)) + 1.0f));
}

struct Problem {
  const void* query;
  const void* keys;
  const void* values;
  void* output;
  const float* sinks;  // one for each query head, or null
  int64_t num_slots, num_heads, group, key_width, value_width, block_size;
  int64_t query_head_stride, query_row_stride;
  int64_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
};

struct Task {
  const int64_t* block_table;
  int64_t first_token;  // row of the packed batch of the sequence's first query
  int64_t start;        // position of that row in its sequence
  int64_t first_row;    // row r is query head r % group of token r / group
  int64_t num_rows;
};

// What a thread computes with; sized by the largest task it has seen.
struct Workspace {
  std::vector<float> query, keys, values, scores, output;

  static float* of(std::vector<float>& buffer, int64_t size) {
    // Room to start at a cache line.
    if (static_cast<int64_t>(buffer.size()) < size + 16) buffer.resize(size + 16);
    auto address = reinterpret_cast<std::uintptr_t>(buffer.data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
};

// The keys and values of up to `kChunk` positions, wherever their blocks lie.
template <typename T>
struct Chunk {
  const T* keys[kChunk];
  const T* values[kChunk];
};

template <typename T>
void find_chunk(const Problem& problem, const Task& task, int64_t kv_head, int64_t first,
                int64_t count, Chunk<T>& chunk) {
  const int64_t base = kv_head * problem.num_slots;
  const T* keys = static_cast<const T*>(problem.keys) + base * problem.key_width;
  const T* values = static_cast<const T*>(problem.values) + base * problem.value_width;
  int64_t block = first / problem.block_size, offset = first % problem.block_size;
  for (int64_t j = 0; j < count; ++block, offset = 0) {
    const int64_t slots = task.block_table[block] * problem.block_size;
    for (; offset < problem.block_size && j < count; ++offset, ++j) {
      chunk.keys[j] = keys + (slots + offset) * problem.key_width;
      chunk.values[j] = values + (slots + offset) * problem.value_width;
    }
  }
}

// Copies rows as floats into a matrix of zeros that is `stride` wide.
template <typename T>
void copy_rows(const T* const* rows, int64_t count, int64_t width, int64_t stride, float* to) {
  for (int64_t j = 0; j < count; ++j, to += stride) {
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(to + d, load(rows[j] + d));
    for (; d < width; ++d) to[d] = static_cast<float>(rows[j][d]);
    for (; d < stride; ++d) to[d] = 0;
  }
}

template <typename T>
const T* query_row(const Problem& problem, const Task& task, int64_t kv_head, int64_t row) {
  const int64_t token = task.first_token + (task.first_row + row) / problem.group;
  const int64_t head = kv_head * problem.group + (task.first_row + row) % problem.group;
  return static_cast<const T*>(problem.query) + head * problem.query_head_stride +
         token * problem.query_row_stride;
}

template <typename T>
T* output_row(const Problem& problem, const Task& task, int64_t kv_head, int64_t row) {
  const int64_t token = task.first_token + (task.first_row + row) / problem.group;
  const int64_t head = kv_head * problem.group + (task.first_row + row) % problem.group;
  return static_cast<T*>(problem.output) +
         (token * problem.num_heads + head) * problem.value_width;
}

inline int64_t position_of(const Problem& problem, const Task& task, int64_t row) {
  return task.start + (task.first_row + row) / problem.group;
}

inline int64_t first_seen(const Problem& problem, int64_t position) {
  return problem.window == 0 ? 0 : std::max<int64_t>(0, position - problem.window + 1);
}

// ---- few rows: lanes hold the width of a head --------------------------------------------------

// scores[row][key] = query[row] . keys[key], for `Rows` rows.
template <int64_t Rows, typename T>
void score_few(const float* query, const T* const* keys, int64_t count, int64_t width,
               float* scores) {
  int64_t j = 0;
  for (; j + kTile <= count; j += kTile) {
    Vec sums[Rows][kTile] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec key[kTile];
      for (int64_t i = 0; i < kTile; ++i) key[i] = load(keys[j + i] + d);
      for (int64_t row = 0; row < Rows; ++row) {
        const Vec q = load(query + row * width + d);
        for (int64_t i = 0; i < kTile; ++i) sums[row][i] += q * key[i];
      }
    }
    for (int64_t row = 0; row < Rows; ++row)
      for (int64_t i = 0; i < kTile; ++i) scores[row * kChunk + j + i] = sum(sums[row][i]);
  }
  for (; j < count; ++j) {
    Vec sums[Rows] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec key = load(keys[j] + d);
      for (int64_t row = 0; row < Rows; ++row) sums[row] += load(query + row * width + d) * key;
    }
    for (int64_t row = 0; row < Rows; ++row) scores[row * kChunk + j] = sum(sums[row]);
  }
}

// output[row] = output[row] * decay[row] + weights[row] @ values, for `Rows` rows.
template <int64_t Rows, typename T>
void accumulate_few(const float* weights, const T* const* values, int64_t count, int64_t width,
                    const float* decay, float* output) {
  auto columns = [&](auto vectors, int64_t d) {
    constexpr int64_t kVectors = decltype(vectors)::value;
    Vec sums[Rows][kVectors];
    for (int64_t row = 0; row < Rows; ++row)
      for (int64_t v = 0; v < kVectors; ++v)
        sums[row][v] = load(output + row * width + d + v * kLanes) * decay[row];
    for (int64_t j = 0; j < count; ++j) {
      Vec value[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) value[v] = load(values[j] + d + v * kLanes);
      for (int64_t row = 0; row < Rows; ++row)
        for (int64_t v = 0; v < kVectors; ++v)
          sums[row][v] += weights[row * kChunk + j] * value[v];
    }
    for (int64_t row = 0; row < Rows; ++row)
      for (int64_t v = 0; v < kVectors; ++v)
        store(output + row * width + d + v * kLanes, sums[row][v]);
  };
  int64_t d = 0;
  for (; d + kMaxVectors * kLanes <= width; d += kMaxVectors * kLanes)
    columns(std::integral_constant<int64_t, kMaxVectors>(), d);
  for (; d < width; d += kLanes) columns(std::integral_constant<int64_t, 1>(), d);
}

// Calls `body` with pieces of at most `kTile` rows, their number known to the compiler.
template <typename Body>
void for_row_pieces(int64_t num_rows, const Body& body) {
  for (int64_t row = 0; row < num_rows; row += kTile) {
    switch (std::min(kTile, num_rows - row)) {
      case 1: body(std::integral_constant<int64_t, 1>(), row); break;
      case 2: body(std::integral_constant<int64_t, 2>(), row); break;
      case 3: body(std::integral_constant<int64_t, 3>(), row); break;
      default: body(std::integral_constant<int64_t, kTile>(), row);
    }
  }
}

// Turns a row's scores into weights; returns by how much earlier sums shrink.
inline float soften(float* scores, int64_t count, float softcap, float& highest, float& total) {
  const int64_t padded = round_up(count, kLanes);
  std::fill(scores + count, scores + padded, kNegInf);
  Vec most = fill(highest);
  for (int64_t j = 0; j < padded; j += kLanes) {
    Vec score = load(scores + j);
    if (softcap != 0) score = score > kLowest ? soft_cap(score, softcap) : score;
    store(scores + j, score);
    most = larger(most, score);
  }
  float next = most[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) next = std::max(next, most[lane]);
  Vec sums = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec weight = exponential(load(scores + j) - next);
    store(scores + j, weight);
    sums += weight;
  }
  const float decay = exponential(fill(highest - next))[0];
  highest = next;
  total = total * decay + sum(sums);
  return decay;
}

template <typename T>
void attend_few(const Problem& problem, const Task& task, int64_t kv_head, Workspace& workspace) {
  const int64_t rows = task.num_rows;
  const int64_t key_width = round_up(problem.key_width, kLanes);
  const int64_t value_width = round_up(problem.value_width, kLanes);
  float* query = Workspace::of(workspace.query, rows * key_width);
  float* scores = Workspace::of(workspace.scores, rows * kChunk);
  float* output = Workspace::of(workspace.output, rows * value_width);
  float highest[kFewRows], total[kFewRows], decay[kFewRows];
  std::fill_n(output, rows * value_width, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = query_row<T>(problem, task, kv_head, row);
    copy_rows(&from, 1, problem.key_width, key_width, query + row * key_width);
    for (int64_t d = 0; d < key_width; ++d) query[row * key_width + d] *= problem.scale;
    const int64_t head = kv_head * problem.group + (task.first_row + row) % problem.group;
    highest[row] = problem.sinks ? problem.sinks[head] : kLowest;
    total[row] = problem.sinks ? 1 : 0;
  }
  const int64_t end = position_of(problem, task, rows - 1) + 1;
  Chunk<T> chunk;
  int64_t first = first_seen(problem, position_of(problem, task, 0));
  for (; first < end; first += kChunk) {
    const int64_t count = std::min(kChunk, end - first);
    find_chunk(problem, task, kv_head, first, count, chunk);
    // Rows that do not fill whole vectors are copied, because reading past them is not safe.
    auto in_whole_vectors = [&](const T* const* from, int64_t width, std::vector<float>& buffer,
                                const auto& body) {
      const int64_t padded = round_up(width, kLanes);
      if (width == padded) return body(from);
      const float* copies[kChunk];
      float* copied = Workspace::of(buffer, kChunk * padded);
      copy_rows(from, count, width, padded, copied);
      for (int64_t j = 0; j < count; ++j) copies[j] = copied + j * padded;
      body(static_cast<const float* const*>(copies));
    };
    in_whole_vectors(chunk.keys, problem.key_width, workspace.keys, [&](auto keys) {
      for_row_pieces(rows, [&](auto piece, int64_t row) {
        score_few<piece.value>(query + row * key_width, keys, count, key_width,
                               scores + row * kChunk);
      });
    });
    for (int64_t row = 0; row < rows; ++row) {
      float* of_row = scores + row * kChunk;
      const int64_t position = position_of(problem, task, row);
      const int64_t seen_from = std::clamp<int64_t>(first_seen(problem, position) - first, 0, count);
      const int64_t seen_to = std::clamp<int64_t>(position + 1 - first, 0, count);
      std::fill(of_row, of_row + seen_from, kNegInf);
      std::fill(of_row + seen_to, of_row + count, kNegInf);
      decay[row] = soften(of_row, count, problem.softcap, highest[row], total[row]);
    }
    in_whole_vectors(chunk.values, problem.value_width, workspace.values, [&](auto values) {
      for_row_pieces(rows, [&](auto piece, int64_t row) {
        accumulate_few<piece.value>(scores + row * kChunk, values, count, value_width, decay + row,
                                    output + row * value_width);
      });
    });
  }
  for (int64_t row = 0; row < rows; ++row) {
    T* to = output_row<T>(problem, task, kv_head, row);
    for (int64_t d = 0; d < problem.value_width; ++d)
      to[d] = static_cast<T>(output[row * value_width + d] / total[row]);
  }
}

// ---- many rows: lanes hold rows ----------------------------------------------------------------

// c[i] = c[i] * decay + sum_k a[i, k] * b[k], for `kTile` rows of `Vectors` vectors each.
template <int64_t Vectors>
void multiply_tile(const float* a, int64_t a_row_stride, int64_t a_k_stride, const float* b,
                   int64_t depth, const Vec* decay, float* c) {
  constexpr int64_t kWidth = Vectors * kLanes;
  Vec sums[kTile][Vectors] = {};
  if (decay != nullptr)
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t v = 0; v < Vectors; ++v)
        sums[i][v] = load(c + i * kWidth + v * kLanes) * decay[v];
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[Vectors];
    for (int64_t v = 0; v < Vectors; ++v) row[v] = load(b + k * kWidth + v * kLanes);
    for (int64_t i = 0; i < kTile; ++i) {
      const float factor = a[i * a_row_stride + k * a_k_stride];
      for (int64_t v = 0; v < Vectors; ++v) sums[i][v] += factor * row[v];
    }
  }
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t v = 0; v < Vectors; ++v) store(c + i * kWidth + v * kLanes, sums[i][v]);
}

// Turns the scores `[count, rows]` of a chunk into weights, and says how earlier sums shrink.
template <int64_t Vectors>
void soften_many(float* scores, int64_t count, float softcap, Vec* highest, Vec* total,
                 Vec* decay) {
  constexpr int64_t kWidth = Vectors * kLanes;
  for (int64_t v = 0; v < Vectors; ++v) {
    Vec most = highest[v];
    for (int64_t j = 0; j < count; ++j) {
      float* at = scores + j * kWidth + v * kLanes;
      Vec score = load(at);
      if (softcap != 0) {
        score = score > kLowest ? soft_cap(score, softcap) : score;
        store(at, score);
      }
      most = larger(most, score);
    }
    Vec sums = {};
    for (int64_t j = 0; j < count; ++j) {
      float* at = scores + j * kWidth + v * kLanes;
      const Vec weight = exponential(load(at) - most);
      store(at, weight);
      sums += weight;
    }
    decay[v] = exponential(highest[v] - most);
    highest[v] = most;
    total[v] = total[v] * decay[v] + sums;
  }
}

template <int64_t Vectors, typename T>
void attend_many(const Problem& problem, const Task& task, int64_t kv_head, Workspace& workspace) {
  constexpr int64_t kWidth = Vectors * kLanes;
  const int64_t key_width = problem.key_width;
  const int64_t value_width = round_up(problem.value_width, kTile);
  float* query = Workspace::of(workspace.query, key_width * kWidth);
  float* keys = Workspace::of(workspace.keys, kChunk * key_width);
  float* values = Workspace::of(workspace.values, kChunk * value_width);
  float* scores = Workspace::of(workspace.scores, kChunk * kWidth);
  float* output = Workspace::of(workspace.output, value_width * kWidth);
  std::fill_n(query, key_width * kWidth, 0.0f);
  std::fill_n(output, value_width * kWidth, 0.0f);
  alignas(64) float start_highest[kWidth], start_total[kWidth];
  alignas(64) int32_t seen_from[kWidth] = {}, seen_to[kWidth] = {};
  std::fill_n(start_highest, kWidth, kLowest);
  std::fill_n(start_total, kWidth, 0.0f);
  for (int64_t row = 0; row < task.num_rows; ++row) {
    const T* from = query_row<T>(problem, task, kv_head, row);
    for (int64_t d = 0; d < key_width; ++d)
      query[d * kWidth + row] = static_cast<float>(from[d]) * problem.scale;
    const int64_t position = position_of(problem, task, row);
    seen_from[row] = static_cast<int32_t>(first_seen(problem, position));
    seen_to[row] = static_cast<int32_t>(position + 1);
    if (problem.sinks) {
      const int64_t head = kv_head * problem.group + (task.first_row + row) % problem.group;
      start_highest[row] = problem.sinks[head];
      start_total[row] = 1;
    }
  }
  Vec highest[Vectors], total[Vectors], decay[Vectors];
  for (int64_t v = 0; v < Vectors; ++v) {
    highest[v] = load(start_highest + v * kLanes);
    total[v] = load(start_total + v * kLanes);
  }
  const int64_t last = task.num_rows - 1;
  Chunk<T> chunk;
  for (int64_t first = seen_from[0]; first < seen_to[last]; first += kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, seen_to[last] - first);
    const int64_t padded = round_up(count, kTile);
    find_chunk(problem, task, kv_head, first, count, chunk);
    copy_rows(chunk.keys, count, key_width, key_width, keys);
    copy_rows(chunk.values, count, problem.value_width, value_width, values);
    std::fill(keys + count * key_width, keys + padded * key_width, 0.0f);
    for (int64_t j = 0; j < padded; j += kTile)
      multiply_tile<Vectors>(keys + j * key_width, key_width, 1, query, key_width, nullptr,
                             scores + j * kWidth);
    if (first < seen_from[last] || first + count > seen_to[0] || task.num_rows < kWidth) {
      for (int64_t j = 0; j < count; ++j)
        for (int64_t row = 0; row < kWidth; ++row) {
          const int32_t position = static_cast<int32_t>(first + j);
          const bool is_seen = (position >= seen_from[row]) & (position < seen_to[row]);
          float& score = scores[j * kWidth + row];
          score = is_seen ? score : kNegInf;
        }
    }
    soften_many<Vectors>(scores, count, problem.softcap, highest, total, decay);
    for (int64_t d = 0; d < value_width; d += kTile)
      multiply_tile<Vectors>(values + d, 1, value_width, scores, count, decay,
                             output + d * kWidth);
  }
  alignas(64) float totals[kWidth];
  for (int64_t v = 0; v < Vectors; ++v) store(totals + v * kLanes, total[v]);
  for (int64_t row = 0; row < task.num_rows; ++row) {
    T* to = output_row<T>(problem, task, kv_head, row);
    for (int64_t d = 0; d < problem.value_width; ++d)
      to[d] = static_cast<T>(output[d * kWidth + row] / totals[row]);
  }
}

// ---- the operator ------------------------------------------------------------------------------

template <typename T>
void attend(const Problem& problem, const Task& task, int64_t kv_head, Workspace& workspace) {
  if (task.num_rows <= kFewRows) return attend_few<T>(problem, task, kv_head, workspace);
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
    for (int64_t index = begin; index < end; ++index)
      attend<T>(problem, tasks[index / num_kv_heads], index % num_kv_heads, workspace);
  });
}

void paged_attention(Tensor output, const Tensor& query, const Tensor& keys, const Tensor& values,
                     const Tensor& row_starts, const Tensor& context_lens,
                     const Tensor& block_tables, int64_t block_size, int64_t window, double scale,
                     double softcap, std::optional<Tensor> sinks) {
  STD_TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1 && keys.is_contiguous() &&
                      values.is_contiguous() && output.is_contiguous(),
                  "query rows, caches and output must be contiguous");
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
      keys.size(1),
      query.size(0),
      query.size(0) / num_kv_heads,
      keys.size(2),
      values.size(2),
      block_size,
      query.stride(0),
      query.stride(1),
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
  STD_TORCH_CHECK(rows.dim() == 3 && rows.stride(2) == 1 && cache.is_contiguous(),
                  "rows and cache must be contiguous");
  STD_TORCH_CHECK(rows.scalar_type() == cache.scalar_type(), "rows and cache must have one type");
  const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  auto* to = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t value_bytes = cache.element_size(), row_bytes = cache.size(2) * value_bytes;
  const int64_t head_stride = rows.stride(0) * value_bytes, stride = rows.stride(1) * value_bytes;
  for (int64_t head = 0; head < cache.size(0); ++head)
    for (int64_t row = 0; row < slots.size(0); ++row)
      std::memcpy(to + (head * cache.size(1) + slot[row]) * row_bytes,
                  from + head * head_stride + row * stride, row_bytes);
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
