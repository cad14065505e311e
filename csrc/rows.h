// Loops over one row of an embedding gradient: the only code that touches its numbers.
#pragma once

#include <cstdint>
#include <cstring>

namespace graddot {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline double to_sum(double x) { return x; }
inline float to_sum(float x) { return x; }
inline float to_sum(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
// Branch-free, so that the row loops vectorise without the processor's own conversion: shift the
// half's exponent and mantissa into place and correct the exponent's bias. That gives a subnormal
// s = f · 2^-24 as 2^-15 + s/2, to which the same less 2^-14 is added. (A product with 2^112 would have
// done for both, but one of a float that is subnormal itself: zero under torch.set_flush_denormal.)
// Infinities and NaNs then need a full exponent.
inline float to_sum(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  const float shifted = from_bits(magnitude + 0x38000000), below = shifted - 0x1p-14F;
  const float value = shifted + (below < 0 ? below : 0);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return from_bits(bits | sign | special);
}

// The type that elements of type T are accumulated in.
template <class T>
using Sum = decltype(to_sum(T{}));

template <class T>
void store_row(Sum<T>* __restrict sum, const T* __restrict row, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    sum[i] = to_sum(row[i]);
  }
}

template <class T>
void add_row(Sum<T>* __restrict sum, const T* __restrict row, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    sum[i] += to_sum(row[i]);
  }
}

template <class T>
void scale_row(T* row, T scale, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    row[i] *= scale;
  }
}

// Columns of one partial dot product. Fixed, so that a dot's rounding does not depend on how many
// threads shared a row.
constexpr int64_t kBlock = 128;

// ⟨direction, row⟩ of every block of columns (the last may be short).
template <class D, class T>
void dot_blocks(const D* __restrict direction, const T* __restrict row, int64_t size,
                Sum<T>* __restrict dots) {
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = size - begin < kBlock ? size : begin + kBlock;
    Sum<T> dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = begin; i < end; ++i) {
      dot += to_sum(direction[i]) * to_sum(row[i]);
    }
    *dots++ = dot;
  }
}

}  // namespace graddot
