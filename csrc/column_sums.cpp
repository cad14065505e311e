#include "column_sums.h"

#include <algorithm>

#include "parallel.h"

namespace graddot {

void column_sums(ColumnSumsPart run, const ColumnSums& p) {
  constexpr int64_t kElementsOfAThread = 65536;
  const int64_t parts = p.parts(), elements = std::min(p.tokens, kSummedTokens) * p.d;
  const int64_t grain = std::max<int64_t>(1, kElementsOfAThread / std::max<int64_t>(elements, 1));
  parallel_for(p.rows * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(p, i / parts, i % parts);
  });
}

}  // namespace graddot
