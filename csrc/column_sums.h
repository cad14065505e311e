// Sums over a sample's tokens, as a bias has for its gradient. Free of torch.
#pragma once

#include <cstdint>

#include "element.h"

namespace graddot {

// Tokens that are summed together: what several threads share does not depend on how many they are, and
// no fp32 sum is longer.
constexpr int64_t kSummedTokens = 128;

struct ColumnSums {
  Element element;
  int64_t rows, tokens, d;
  const void* x;  // (rows, tokens, d), of unit stride along d
  int64_t row_stride, token_stride;
  float* sums;  // (rows, parts, d)

  int64_t parts() const { return tokens == 0 ? 1 : (tokens + kSummedTokens - 1) / kSummedTokens; }
};

using ColumnSumsPart = void (*)(const ColumnSums& problem, int64_t row, int64_t part);

void column_sums(ColumnSumsPart run, const ColumnSums& problem);

}  // namespace graddot
