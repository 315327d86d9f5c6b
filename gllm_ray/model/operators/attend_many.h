// Attention of many rows (a prefill chunk): the lanes of a vector hold rows.

#pragma once

#include <algorithm>

#include "attention_task.h"

namespace {

// c[i] = c[i] * decay + sum_k a[i, k] * b[k], for `kTile` rows of `Vectors` vectors each; `a` and `b`
// are floats or, if `K` is that, pairs.
template <typename K, int64_t Vectors>
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
      const Vec factor = fill(a[i * a_row_stride + k * a_k_stride]);
      for (int64_t v = 0; v < Vectors; ++v)
        sums[i][v] = multiply_add<K>(factor, row[v], sums[i][v]);
    }
  }
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t v = 0; v < Vectors; ++v) store(c + i * kWidth + v * kLanes, sums[i][v]);
}

// Turns the products `[count, rows]` of a chunk into weights, and says how earlier sums shrink.
template <int64_t Vectors>
void soften_many(float* scores, int64_t count, const Problem& problem, Vec* highest, Vec* total,
                 Vec* decay) {
  constexpr int64_t kWidth = Vectors * kLanes;
  for (int64_t v = 0; v < Vectors; ++v) {
    Vec most = highest[v];
    for (int64_t j = 0; j < count; ++j) {
      float* at = scores + j * kWidth + v * kLanes;
      Vec score = load(at) * problem.scale;
      if (problem.softcap != 0) score = score > kLowest ? soft_cap(score, problem.softcap) : score;
      store(at, score);
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

// Turns each two rows of floats into one of pairs, in their memory; a last one without another is
// paired with zeros. Returns how many there are.
inline int64_t pair_weights(float* weights, int64_t count, int64_t width) {
  for (int64_t j = 0; j < count; j += 2)
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec second = j + 1 < count ? load(weights + (j + 1) * width + i) : Vec{};
      store(weights + j / 2 * width + i,
            to_pairs(to_half(load(weights + j * width + i)), to_half(second)));
    }
  return (count + 1) / 2;
}

// The values of each two positions as one row of pairs, `stride` wide.
inline void pair_values(const BFloat16* const* rows, int64_t count, int64_t width, int64_t stride,
                        float* to) {
  for (int64_t j = 0; j < count; j += 2, to += stride) {
    const BFloat16 *first = rows[j], *second = j + 1 < count ? rows[j + 1] : nullptr;
    int64_t d = 0;
    for (; second && d + kLanes <= width; d += kLanes) {
      HalfVec halves[2];
      std::memcpy(&halves[0], first + d, sizeof halves[0]);
      std::memcpy(&halves[1], second + d, sizeof halves[1]);
      store(to + d, to_pairs(halves[0], halves[1]));
    }
    for (; d < width; ++d) to[d] = to_lane(Pair{first[d], second ? second[d] : BFloat16(0.0f)});
    for (; d < stride; ++d) to[d] = 0;
  }
}

template <int64_t Vectors, typename K, typename T>
void attend_many_as(const Problem& problem, const Task& task, int64_t kv_head,
                    Workspace& workspace) {
  constexpr int64_t kWidth = Vectors * kLanes;
  const int64_t key_width = problem.key_width * sizeof(T) / sizeof(K);
  const int64_t value_width = round_up(problem.value_width, kTile);
  float* query = aligned(workspace.query, key_width * kWidth);
  float* keys = aligned(workspace.keys, kChunk * key_width);
  float* values = aligned(workspace.values, kChunk * value_width);
  float* scores = aligned(workspace.scores, kChunk * kWidth);
  float* output = aligned(workspace.output, value_width * kWidth);
  std::fill_n(query, key_width * kWidth, 0.0f);
  std::fill_n(output, value_width * kWidth, 0.0f);
  alignas(64) float start_highest[kWidth], start_total[kWidth];
  alignas(64) int32_t seen_from[kWidth] = {}, seen_to[kWidth] = {};
  std::fill_n(start_highest, kWidth, kLowest);
  std::fill_n(start_total, kWidth, 0.0f);
  for (int64_t row = 0; row < task.num_rows; ++row) {
    const K* from = reinterpret_cast<const K*>(query_row<T>(problem, task, kv_head, row));
    for (int64_t d = 0; d < key_width; ++d) query[d * kWidth + row] = to_lane(from[d]);
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
  Chunk<K, T> chunk;
  for (int64_t first = seen_from[0]; first < seen_to[last]; first += kChunk) {
    find_chunk(problem, task, kv_head, first, seen_to[last], kChunk, chunk);
    const int64_t count = chunk.count, padded = round_up(count, kTile);
    copy_rows(chunk.keys, count, key_width, key_width, keys);
    if constexpr (std::is_same_v<K, Pair>)
      pair_values(chunk.values, count, problem.value_width, value_width, values);
    else
      copy_rows(chunk.values, count, problem.value_width, value_width, values);
    std::fill(keys + count * key_width, keys + padded * key_width, 0.0f);
    for (int64_t j = 0; j < padded; j += kTile)
      multiply_tile<K, Vectors>(keys + j * key_width, key_width, 1, query, key_width, nullptr,
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
    soften_many<Vectors>(scores, count, problem, highest, total, decay);
    const bool in_pairs = std::is_same_v<K, Pair>;
    const int64_t depth = in_pairs ? pair_weights(scores, count, kWidth) : count;
    for (int64_t d = 0; d < value_width; d += kTile)
      multiply_tile<K, Vectors>(values + d, 1, value_width, scores, depth, decay,
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

template <int64_t Vectors, typename T>
void attend_many(const Problem& problem, const Task& task, int64_t kv_head, Workspace& workspace) {
  if constexpr (kHasPairs && std::is_same_v<T, BFloat16>)
    if (problem.key_width % (2 * kLanes) == 0)
      return attend_many_as<Vectors, Pair, T>(problem, task, kv_head, workspace);
  attend_many_as<Vectors, T, T>(problem, task, kv_head, workspace);
}

}  // namespace
