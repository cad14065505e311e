// Vectors of GRADDOT_LANES floats, in the compiler's own extension. Included by translation units
// that are compiled for one instruction set each (avx2.cpp, avx512.cpp): everything here has
// internal linkage, and no standard-library template is used, lest the linker keep one copy of a
// function, compiled for a newer processor, for all.
#pragma once

#include <cstdint>

namespace {

constexpr int kLanes = GRADDOT_LANES;
typedef float Vector __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes), may_alias));
// Loads and stores go through this type wherever the floats lie; no variable has it: clang forgets
// the alignment of an array's elements, and would then write to one that is not aligned as if it were.
typedef float VectorInMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const VectorInMemory*>(from); }
inline void store(float* to, const Vector& x) { *reinterpret_cast<VectorInMemory*>(to) = x; }
inline Vector all(float x) { return x - Vector{}; }

// `count` floats; 0 in the other lanes.
inline Vector load_some(const float* from, int64_t count) {
  if (count == kLanes) return load(from);
  Vector x{};
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = from[lane];
  return x;
}

inline void store_some(float* to, const Vector& x, int64_t count) {
  if (count == kLanes) return store(to, x);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = x[lane];
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace
