// A few tokens of a sample, summed: some columns at a time stay in registers, by a few tokens and of all.
#pragma once

#include "column_sums.h"
#include "vector.h"

namespace {

template <class Element>
void column_sums_part(const graddot::ColumnSums& p, int64_t row, int64_t part) {
  constexpr int64_t kVectors = 4, kFew = 16;
  const int64_t first = part * graddot::kTokensOfAPart;
  const int64_t tokens = smaller(graddot::kTokensOfAPart, p.tokens - first);
  const Element* x = static_cast<const Element*>(p.x) + row * p.row_stride + first * p.token_stride;
  float* sums = p.sums + (row * p.parts() + part) * p.d;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= p.d; i += kVectors * kLanes) {
    Vector sum[kVectors] = {};
    for (int64_t begin = 0; begin < tokens; begin += kFew) {
      const int64_t end = smaller(begin + kFew, tokens);
      Vector of_few[kVectors] = {};
      for (int64_t token = begin; token < end; ++token) {
        const Element* from = x + token * p.token_stride + i;
#pragma GCC unroll 4
        for (int64_t k = 0; k < kVectors; ++k) of_few[k] += load(from + k * kLanes);
      }
      for (int64_t k = 0; k < kVectors; ++k) sum[k] += of_few[k];
    }
    for (int64_t k = 0; k < kVectors; ++k) store(sums + i + k * kLanes, sum[k]);
  }
  for (; i < p.d; i += kLanes) {
    const int64_t n = smaller(kLanes, p.d - i);
    Vector sum{};
    for (int64_t token = 0; token < tokens; ++token) sum += load_some(x + token * p.token_stride + i, n);
    store_some(sums + i, sum, n);
  }
}

}  // namespace
