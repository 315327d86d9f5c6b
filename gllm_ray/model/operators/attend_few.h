// Attention of few rows (a decode): the lanes of a vector hold the width of a head.

#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_task.h"

namespace {

constexpr int64_t kChunkBytes = 16384;  // of keys and values, so that they stay in the first cache

// scores[row][key] = query[row] . keys[key], for `Rows` rows.
template <int64_t Rows, typename K, typename N>
void score_few(const float* query, const K* const* keys, int64_t count, int64_t width,
               const Upcoming<N>& upcoming, float* scores) {
  int64_t j = 0;
  for (; j + kTile <= count; j += kTile) {
    for (int64_t i = 0; i < kTile; ++i) upcoming.fetch(j + i);
    Vec sums[Rows][kTile] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec key[kTile];
      for (int64_t i = 0; i < kTile; ++i) key[i] = load(keys[j + i] + d);
      for (int64_t row = 0; row < Rows; ++row) {
        const Vec q = load(query + row * width + d);
        for (int64_t i = 0; i < kTile; ++i) sums[row][i] = multiply_add<K>(q, key[i], sums[row][i]);
      }
    }
    for (int64_t row = 0; row < Rows; ++row) add_lanes<kTile>(sums[row], scores + row * kChunk + j);
  }
  for (; j < count; ++j) {
    upcoming.fetch(j);
    Vec sums[Rows] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec key = load(keys[j] + d);
      for (int64_t row = 0; row < Rows; ++row)
        sums[row] = multiply_add<K>(load(query + row * width + d), key, sums[row]);
    }
    for (int64_t row = 0; row < Rows; ++row) scores[row * kChunk + j] = sum(sums[row]);
  }
}

// output[row] = output[row] * decay[row] + weights[row] @ values, for `Rows` rows.
template <int64_t Rows, typename T, typename N>
void accumulate_few(const float* weights, const T* const* values, int64_t count, int64_t width,
                    const float* decay, const Upcoming<N>& upcoming, float* output) {
  auto columns = [&](auto vectors, int64_t d) {
    constexpr int64_t kVectors = decltype(vectors)::value;
    Vec sums[Rows][kVectors];
    for (int64_t row = 0; row < Rows; ++row)
      for (int64_t v = 0; v < kVectors; ++v)
        sums[row][v] = load(output + row * width + d + v * kLanes) * decay[row];
    for (int64_t j = 0; j < count; ++j) {
      if (d == 0) upcoming.fetch(j);
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

// Turns a row's products into weights; returns by how much earlier sums shrink.
inline float soften(float* scores, int64_t count, const Problem& problem, float& highest,
                    float& total) {
  const int64_t padded = round_up(count, kLanes);
  std::fill(scores + count, scores + padded, kNegInf);
  Vec most = fill(highest);
  for (int64_t j = 0; j < padded; j += kLanes) {
    Vec score = load(scores + j) * problem.scale;
    if (problem.softcap != 0) score = score > kLowest ? soft_cap(score, problem.softcap) : score;
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

// Rows that do not fill whole vectors are copied, because reading past them is not safe.
template <typename T, typename Body>
void in_whole_vectors(const T* const* rows, int64_t count, int64_t width,
                      std::vector<float>& buffer, const Body& body) {
  const int64_t padded = round_up(width, kLanes);
  if (width == padded) return body(rows);
  if constexpr (!std::is_same_v<T, Pair>) {
    const float* copies[kChunk];
    float* copied = aligned(buffer, kChunk * padded);
    copy_rows(rows, count, width, padded, copied);
    for (int64_t j = 0; j < count; ++j) copies[j] = copied + j * padded;
    body(static_cast<const float* const*>(copies));
  }
}

// The rows of a task, and what the chunks so far made of them.
struct FewRows {
  int64_t count, key_width, value_width;  // widths in whole vectors
  float *query, *scores, *output;
  float highest[kFewRows], total[kFewRows], decay[kFewRows];
};

template <typename K, typename T>
void start_rows(const Problem& problem, HeadTask current, Workspace& workspace, FewRows& rows) {
  const auto& [task, kv_head] = current;
  const int64_t key_width = problem.key_width * sizeof(T) / sizeof(K);
  rows.count = task->num_rows;
  rows.key_width = round_up(key_width, kLanes);
  rows.value_width = round_up(problem.value_width, kLanes);
  rows.query = aligned(workspace.query, rows.count * rows.key_width);
  rows.scores = aligned(workspace.scores, rows.count * kChunk);
  rows.output = aligned(workspace.output, rows.count * rows.value_width);
  std::fill_n(rows.output, rows.count * rows.value_width, 0.0f);
  for (int64_t row = 0; row < rows.count; ++row) {
    const auto* from = reinterpret_cast<const K*>(query_row<T>(problem, *task, kv_head, row));
    copy_rows(&from, 1, key_width, rows.key_width, rows.query + row * rows.key_width);
    const int64_t head = kv_head * problem.group + (task->first_row + row) % problem.group;
    rows.highest[row] = problem.sinks ? problem.sinks[head] : kLowest;
    rows.total[row] = problem.sinks ? 1 : 0;
  }
}

// What the rows see of a chunk from position `first` on, while another comes to the cache.
template <typename K, typename T>
void attend_chunk(const Problem& problem, const Task& task, int64_t first, const Chunk<K, T>& chunk,
                  const Chunk<K, T>& upcoming, Workspace& workspace, FewRows& rows) {
  const int64_t count = chunk.count, key_width = problem.key_width * sizeof(T) / sizeof(K);
  const Upcoming<K> next_keys{upcoming.keys, upcoming.count, key_width};
  const Upcoming<T> next_values{upcoming.values, upcoming.count, problem.value_width};
  in_whole_vectors(chunk.keys, count, key_width, workspace.keys, [&](auto keys) {
    for_row_pieces(rows.count, [&](auto piece, int64_t row) {
      score_few<piece.value>(rows.query + row * rows.key_width, keys, count, rows.key_width,
                             row == 0 ? next_keys : Upcoming<K>{}, rows.scores + row * kChunk);
    });
  });
  for (int64_t row = 0; row < rows.count; ++row) {
    float* scores = rows.scores + row * kChunk;
    const int64_t position = position_of(problem, task, row);
    const int64_t seen_from = std::clamp<int64_t>(first_seen(problem, position) - first, 0, count);
    const int64_t seen_to = std::clamp<int64_t>(position + 1 - first, 0, count);
    std::fill(scores, scores + seen_from, kNegInf);
    std::fill(scores + seen_to, scores + count, kNegInf);
    rows.decay[row] = soften(scores, count, problem, rows.highest[row], rows.total[row]);
  }
  in_whole_vectors(chunk.values, count, problem.value_width, workspace.values, [&](auto values) {
    for_row_pieces(rows.count, [&](auto piece, int64_t row) {
      accumulate_few<piece.value>(rows.scores + row * kChunk, values, count, rows.value_width,
                                  rows.decay + row, row == 0 ? next_values : Upcoming<T>{},
                                  rows.output + row * rows.value_width);
    });
  });
  for (int64_t j = count; j < upcoming.count; ++j) {
    next_keys.fetch(j);
    next_values.fetch(j);
  }
}

// Attention of a task, while the first keys and values of the next one come to the cache.
template <typename K, typename T>
void attend_few_as(const Problem& problem, HeadTask current, const HeadTask* next,
                   Workspace& workspace) {
  const auto& [task, kv_head] = current;
  FewRows rows;
  start_rows<K, T>(problem, current, workspace, rows);
  const int64_t row_bytes = (problem.key_width + problem.value_width) * sizeof(T);
  const int64_t most = std::clamp(kChunkBytes / row_bytes / kLanes * kLanes, kLanes, kChunk);
  const int64_t end = end_of(problem, *task);
  int64_t first = begin_of(problem, *task);
  Chunk<K, T> chunks[2];
  Chunk<K, T>*chunk = &chunks[0], *upcoming = &chunks[1];
  find_chunk(problem, *task, kv_head, first, end, most, *chunk);
  for (; first < end; first += most, std::swap(chunk, upcoming)) {
    upcoming->count = 0;
    if (first + most < end)
      find_chunk(problem, *task, kv_head, first + most, end, most, *upcoming);
    else if (next)
      find_chunk(problem, *next->task, next->kv_head, begin_of(problem, *next->task),
                 end_of(problem, *next->task), most, *upcoming);
    attend_chunk(problem, *task, first, *chunk, *upcoming, workspace, rows);
  }
  for (int64_t row = 0; row < rows.count; ++row) {
    T* to = output_row<T>(problem, *task, kv_head, row);
    for (int64_t d = 0; d < problem.value_width; ++d)
      to[d] = static_cast<T>(rows.output[row * rows.value_width + d] / rows.total[row]);
  }
}

template <typename T>
void attend_few(const Problem& problem, HeadTask current, const HeadTask* next,
                Workspace& workspace) {
  if constexpr (kHasPairs && std::is_same_v<T, BFloat16>)
    if (problem.key_width % (2 * kLanes) == 0)
      return attend_few_as<Pair, T>(problem, current, next, workspace);
  attend_few_as<T, T>(problem, current, next, workspace);
}

}  // namespace
