// What attention is computed for, and where its queries, keys and values lie.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kMaxVectors = kNumRegisters / 8;  // of rows; so kTile times as many sums fit
constexpr int64_t kTile = 4;       // keys, value columns or rows whose sums are in registers
constexpr int64_t kChunk = 64;     // keys between two updates of the softmax, at most
constexpr int64_t kFewRows = 12;   // up to which the lanes hold a head's width
constexpr int64_t kCacheLine = 64;
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
  int64_t num_heads, group, key_width, value_width, block_size;
  int64_t query_head_stride, query_row_stride;
  int64_t key_head_stride, key_slot_stride, value_head_stride, value_slot_stride;
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

// A task for one KV head.
struct HeadTask {
  const Task* task;
  int64_t kv_head;
};

// What a thread computes with; sized by the largest task it has seen.
struct Workspace {
  std::vector<float> query, keys, values, scores, output;
};

// The keys and values of up to `kChunk` positions, wherever their blocks lie. Where the keys are
// multiplied in pairs, `K` is `Pair`, else both are what the caches hold.
template <typename K, typename T>
struct Chunk {
  const K* keys[kChunk];
  const T* values[kChunk];
  int64_t count = 0;
};

template <typename K, typename T>
void find_chunk(const Problem& problem, const Task& task, int64_t kv_head, int64_t first,
                int64_t end, int64_t most, Chunk<K, T>& chunk) {
  const T* keys = static_cast<const T*>(problem.keys) + kv_head * problem.key_head_stride;
  const T* values = static_cast<const T*>(problem.values) + kv_head * problem.value_head_stride;
  int64_t block = first / problem.block_size, offset = first % problem.block_size;
  chunk.count = std::min(most, end - first);
  for (int64_t j = 0; j < chunk.count; ++block, offset = 0) {
    const int64_t slots = task.block_table[block] * problem.block_size;
    for (; offset < problem.block_size && j < chunk.count; ++offset, ++j) {
      const int64_t slot = slots + offset;
      chunk.keys[j] = reinterpret_cast<const K*>(keys + slot * problem.key_slot_stride);
      chunk.values[j] = values + slot * problem.value_slot_stride;
    }
  }
}

// Rows that are brought to the second cache while others are read, one with each of them: all at
// once would wait for each other, and so would more lines than the first cache can await.
template <typename T>
struct Upcoming {
  const T* const* rows;
  int64_t count, width;

  void fetch(int64_t j) const {
    if (j >= count) return;
    constexpr int64_t kStep = kCacheLine / sizeof(T);
    for (int64_t d = 0; d < width; d += kStep) __builtin_prefetch(rows[j] + d, 0, 2);
    asm volatile("");  // GCC removes calls of functions that only prefetch
  }
};

// Copies rows, as floats if they are not of pairs, into a matrix of zeros that is `stride` wide.
template <typename T>
void copy_rows(const T* const* rows, int64_t count, int64_t width, int64_t stride, float* to) {
  for (int64_t j = 0; j < count; ++j, to += stride) {
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(to + d, load(rows[j] + d));
    for (; d < width; ++d) to[d] = to_lane(rows[j][d]);
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

// The positions that the rows of a task see: from the first one's first to the last one's own.
inline int64_t begin_of(const Problem& problem, const Task& task) {
  return first_seen(problem, position_of(problem, task, 0));
}

inline int64_t end_of(const Problem& problem, const Task& task) {
  return position_of(problem, task, task.num_rows - 1) + 1;
}

}  // namespace
