// What runs on the parts of every sample's tokens, side by side.
#include "token_parts.h"

#include <algorithm>

#include "column_sums.h"
#include "norm.h"
#include "parallel.h"

namespace graddot {
namespace {

template <class Problem>
void run_parts(void (*run)(const Problem&, int64_t, int64_t), const Problem& p, int64_t elements_of_a_thread) {
  const int64_t parts = parts_of(p.tokens), elements = std::min(p.tokens, kTokensOfAPart) * p.d;
  const int64_t grain = std::max<int64_t>(1, elements_of_a_thread / std::max<int64_t>(elements, 1));
  parallel_for(p.rows * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(p, i / parts, i % parts);
  });
}

}  // namespace

void norm_backward(NormPart run, const NormProblem& problem) { run_parts(run, problem, 16384); }

void column_sums(ColumnSumsPart run, const ColumnSums& problem) { run_parts(run, problem, 65536); }

}  // namespace graddot
