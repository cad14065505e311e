// Vectors of GRADDOT_LANES floats, in the compiler's own extension. Included by translation units
// that are compiled for one instruction set each (avx2.cpp, avx512.cpp): everything here has
// internal linkage, and no standard-library template is used, lest the linker keep one copy of a
// function, compiled for a newer processor, for all.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "element.h"

namespace {

using graddot::Bf16;
using graddot::Fp16;

constexpr int kLanes = GRADDOT_LANES;
typedef float Vector __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes), may_alias));
// Loads and stores go through this type wherever the floats lie; no variable has it: clang forgets
// the alignment of an array's elements, and would then write to one that is not aligned as if it were.
typedef float VectorInMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t ShortVector __attribute__((vector_size(2 * kLanes), may_alias));
typedef uint16_t ShortVectorInMemory __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint32_t UnsignedVector __attribute__((vector_size(4 * kLanes), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const VectorInMemory*>(from); }
inline void store(float* to, const Vector& x) { *reinterpret_cast<VectorInMemory*>(to) = x; }
inline Vector all(float x) { return x - Vector{}; }

// `count` of them; 0 in the other lanes.
inline UnsignedVector widened(const uint16_t* from, int64_t count = kLanes) {
  if (count >= kLanes) {
    const ShortVector x = *reinterpret_cast<const ShortVectorInMemory*>(from);
    return __builtin_convertvector(x, UnsignedVector);
  }
  UnsignedVector x{};
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = from[lane];
  return x;
}

inline Vector load(const Bf16* from) {
  const UnsignedVector bits = widened(&from->bits) << 16;
  return reinterpret_cast<const Vector&>(bits);
}

// Rounded to nearest, ties to even; a NaN stays one.
inline void store(Bf16* to, const Vector& x) {
  UnsignedVector bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const UnsignedVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UnsignedVector quiet = (bits >> 16) | 0x40;
  const ShortVector shorts = __builtin_convertvector(x == x ? rounded : quiet, ShortVector);
  *reinterpret_cast<ShortVectorInMemory*>(&to->bits) = shorts;
}

// AVX's own conversions, eight at a time: GCC warns of its intrinsics of sixteen.
inline Vector load(const Fp16* from) {
  Vector x;
  for (int lane = 0; lane < kLanes; lane += 8) {
    const __m256 floats = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + lane)));
    __builtin_memcpy(reinterpret_cast<float*>(&x) + lane, &floats, sizeof(floats));
  }
  return x;
}

inline void store(Fp16* to, const Vector& x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  for (int lane = 0; lane < kLanes; lane += 8) {
    __m256 floats;
    __builtin_memcpy(&floats, reinterpret_cast<const float*>(&x) + lane, sizeof(floats));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + lane), _mm256_cvtps_ph(floats, kNearest));
  }
}

// `count` elements; 0 in the other lanes.
inline Vector load_some(const float* from, int64_t count) {
  if (count == kLanes) return load(from);
  Vector x{};
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = from[lane];
  return x;
}

template <class Short>
inline Vector load_some(const Short* from, int64_t count) {
  if (count == kLanes) return load(from);
  Short some[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) some[lane] = from[lane];
  return load(some);
}

inline void store_some(float* to, const Vector& x, int64_t count) {
  if (count == kLanes) return store(to, x);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = x[lane];
}

template <class Short>
inline void store_some(Short* to, const Vector& x, int64_t count) {
  if (count == kLanes) return store(to, x);
  Short some[kLanes];
  store(some, x);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = some[lane];
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace
