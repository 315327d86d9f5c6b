// Attention of many rows (a prefill chunk): the lanes of a vector hold rows.

#pragma once

#include <algorithm>

#include "attention_task.h"

namespace {

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
  Chunk<T, T> chunk;
  for (int64_t first = seen_from[0]; first < seen_to[last]; first += kChunk) {
    find_chunk(problem, task, kv_head, first, seen_to[last], kChunk, chunk);
    const int64_t count = chunk.count, padded = round_up(count, kTile);
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

}  // namespace
