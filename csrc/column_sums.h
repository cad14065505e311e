// Sums over a sample's tokens, as a bias has for its gradient. Free of torch.
#pragma once

#include <cstdint>

#include "element.h"
#include "token_parts.h"

namespace graddot {

struct ColumnSums {
  Element element;
  int64_t rows, tokens, d;
  const void* x;  // (rows, tokens, d), of unit stride along d
  int64_t row_stride, token_stride;
  float* sums;  // (rows, parts, d)

  int64_t parts() const { return parts_of(tokens); }
};

using ColumnSumsPart = void (*)(const ColumnSums& problem, int64_t row, int64_t part);

void column_sums(ColumnSumsPart run, const ColumnSums& problem);

}  // namespace graddot
