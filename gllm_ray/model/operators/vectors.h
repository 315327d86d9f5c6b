// Vectors of floats, as wide as the CPU's registers, by the extensions of GCC and Clang.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));

inline Vec load(const float* from) {
  Vec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}

// GCC widens by halves what the CPU widens at once.
inline UintVec widen(HalfVec half) {
#ifdef __AVX512F__
  return (UintVec)_mm512_cvtepu16_epi32((__m256i)half);
#else
  return __builtin_convertvector(half, UintVec);
#endif
}

inline Vec load(const BFloat16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  const UintVec bits = widen(half) << 16;
  Vec vec;
  std::memcpy(&vec, &bits, sizeof vec);
  return vec;
}

// Two values whose products with two others are added as one, where the CPU has an instruction for
// that. Vectors of pairs have the type of those of floats.
struct Pair {
  BFloat16 first, second;
};

inline Vec load(const Pair* from) {
  Vec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}

inline Vec load(const int8_t* from) {
#ifdef __AVX512F__
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
  ByteVec bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, IntVec), Vec);
#endif
}

inline void store(float* to, Vec vec) { std::memcpy(to, &vec, sizeof vec); }

// Rounds to the nearest bfloat16, to even between two.
inline HalfVec to_half(Vec vec) {
#ifdef __AVX512BF16__
  return (HalfVec)_mm512_cvtneps_pbh((__m512)vec);
#else
  UintVec bits;
  std::memcpy(&bits, &vec, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = vec == vec ? bits : UintVec{} + 0x7fc0;
  return __builtin_convertvector(bits, HalfVec);
#endif
}

inline void store(BFloat16* to, Vec vec) {
  const HalfVec half = to_half(vec);
  std::memcpy(to, &half, sizeof half);
}

inline Vec to_pairs(HalfVec first, HalfVec second) {
  const UintVec bits = widen(first) | widen(second) << 16;
  Vec vec;
  std::memcpy(&vec, &bits, sizeof vec);
  return vec;
}

template <typename V>
float to_lane(V value) {
  return static_cast<float>(value);
}

template <>
inline float to_lane(Pair value) {
  float lane;
  std::memcpy(&lane, &value, sizeof lane);
  return lane;
}

#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Of types whose vectors are multiplied as they are loaded.
template <typename V>
constexpr bool kIsMultiplied = std::is_same_v<V, float> || std::is_same_v<V, Pair>;

// sum + a * b, of floats or, if `V` is that, of pairs.
template <typename V>
Vec multiply_add(Vec a, Vec b, Vec sum) {
  if constexpr (std::is_same_v<V, Pair>) {
#ifdef __AVX512BF16__
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    static_assert(!kHasPairs);
#endif
  } else {
    return sum + a * b;
  }
}

inline Vec fill(float value) { return value - Vec{}; }  // costs nothing, as adding 0 would

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

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

inline Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }

inline float sum(Vec vec) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)vec);
#else
  return ((vec[0] + vec[4]) + (vec[1] + vec[5])) + ((vec[2] + vec[6]) + (vec[3] + vec[7]));
#endif
}

// The sum of each vector; of four, for little more than one.
template <int64_t Count>
void add_lanes(const Vec* vecs, float* totals) {
#ifdef __AVX512F__
  if constexpr (Count == 4) {
    const __m512 a = (__m512)vecs[0], b = (__m512)vecs[1];
    const __m512 c = (__m512)vecs[2], d = (__m512)vecs[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 quarters =  // each holds a part of all four
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m512 halves = _mm512_add_ps(quarters, _mm512_shuffle_f32x4(quarters, quarters, 0x4e));
    const __m512 whole = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
    return _mm_storeu_ps(totals, _mm512_castps512_ps128(whole));
  }
#endif
  for (int64_t i = 0; i < Count; ++i) totals[i] = sum(vecs[i]);
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The values as floats.
template <typename T>
void to_floats(float* to, const T* from, int64_t size) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) store(to + at, load(from + at));
  for (; at < size; ++at) to[at] = static_cast<float>(from[at]);
}

// Room for `size` floats that starts at a cache line, in a buffer that grows.
inline float* aligned(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size + 16) buffer.resize(size + 16);
  auto address = reinterpret_cast<std::uintptr_t>(buffer.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

}  // namespace
