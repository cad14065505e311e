#include "cross_entropy.h"

#include <algorithm>

#include "parallel.h"

namespace graddot {

void cross_entropy_grad(CrossEntropyRow row, const CrossEntropy& form, int64_t rows,
                        const int64_t* labels, int64_t ignore_index, float* logits, int64_t stride,
                        float* losses) {
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* x = logits + i * stride;
      if (labels[i] == ignore_index) {
        std::fill(x, x + form.vocab, 0.0F);
        losses[i] = 0;
      } else {
        losses[i] = row(form, labels[i], x);
      }
    }
  });
}

}  // namespace graddot
