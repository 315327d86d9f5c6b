// Vectors of floats, as wide as the CPU's registers, by the extensions of GCC and Clang.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace {

using torch::headeronly::BFloat16;

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
constexpr int64_t kNumRegisters = 32;
#else
constexpr int64_t kLanes = 8;
constexpr int64_t kNumRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

inline Vec load(const float* from) {
  Vec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}

inline Vec load(const BFloat16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  UintVec bits = __builtin_convertvector(half, UintVec) << 16;
  Vec vec;
  std::memcpy(&vec, &bits, sizeof vec);
  return vec;
}

inline void store(float* to, Vec vec) { std::memcpy(to, &vec, sizeof vec); }

inline Vec fill(float value) { return Vec{} + value; }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec vec) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)vec);
#else
  return ((vec[0] + vec[4]) + (vec[1] + vec[5])) + ((vec[2] + vec[6]) + (vec[3] + vec[7]));
#endif
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace
