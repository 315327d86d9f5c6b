// What attention is computed for, and where its queries, keys and values lie.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kMaxVectors = kNumRegisters / 8;  // of rows; so kTile times as many sums fit
constexpr int64_t kTile = 4;       // keys, value columns or rows whose sums are in registers
constexpr int64_t kChunk = 64;     // keys between two updates of the softmax
constexpr int64_t kFewRows = 12;   // up to which the lanes hold a head's width
constexpr float kNegInf = -__builtin_inff();
constexpr float kLowest = -1e30f;  // a running maximum before the first key

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
};

// The keys and values of up to `kChunk` positions, wherever their blocks lie, on their way to the
// cache.
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
      for (int64_t d = 0; d < problem.key_width; d += 64 / sizeof(T))
        __builtin_prefetch(chunk.keys[j] + d);
      for (int64_t d = 0; d < problem.value_width; d += 64 / sizeof(T))
        __builtin_prefetch(chunk.values[j] + d);
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

}  // namespace
