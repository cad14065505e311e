#include "cross_entropy.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace graddot {

void cross_entropy_grad(CrossEntropyRow row, const CrossEntropy& form, int64_t rows,
                        const int64_t* labels, int64_t ignore_index, void* logits, int64_t stride,
                        float* losses) {
  const int64_t size = size_of(form.element);
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> memory;
    if (form.element != Element::kFp32) {
      memory.resize(std::max(memory.size(), static_cast<size_t>(form.vocab)));
    }
    for (int64_t i = begin; i < end; ++i) {
      char* x = static_cast<char*>(logits) + i * stride * size;
      if (labels[i] == ignore_index) {
        std::memset(x, 0, static_cast<size_t>(form.vocab * size));
        losses[i] = 0;
      } else {
        losses[i] = row(form, labels[i], x, memory.data());
      }
    }
  });
}

}  // namespace graddot
