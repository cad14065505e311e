// Softmax cross-entropy and its gradient in place of the logits. Free of torch.
#pragma once

#include <cstdint>

namespace graddot {

// loss = lse - (1 - smoothing) x_label - smoothing · mean(x) + z_loss · lse², lse = log Σ exp(x).
struct CrossEntropy {
  int64_t vocab;
  float label_smoothing, z_loss;
};

// Replaces a row of logits by the gradient of its loss, which it returns.
using CrossEntropyRow = float (*)(const CrossEntropy& form, int64_t label, float* logits);

// The same for `rows` rows, `stride` apart: losses and gradients are 0 where the label is
// `ignore_index`; other labels have been checked.
void cross_entropy_grad(CrossEntropyRow row, const CrossEntropy& form, int64_t rows,
                        const int64_t* labels, int64_t ignore_index, float* logits, int64_t stride,
                        float* losses);

}  // namespace graddot
