#include "cross_entropy.h"

#include <algorithm>

#include "instruction_sets.h"
#include "parallel.h"

namespace graddot {

bool cross_entropy_grad(const CrossEntropy& form, int64_t rows, const int64_t* labels,
                        int64_t ignore_index, float* logits, float* losses) {
  const InstructionSet* set = instruction_set();
  if (set == nullptr) {
    return false;
  }
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = logits + i * form.vocab;
      if (labels[i] == ignore_index) {
        std::fill(row, row + form.vocab, 0.0F);
        losses[i] = 0;
      } else {
        losses[i] = set->cross_entropy_row(form, labels[i], row);
      }
    }
  });
  return true;
}

}  // namespace graddot
