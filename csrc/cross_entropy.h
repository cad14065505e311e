// Softmax cross-entropy and its gradient in place of the logits. Free of torch.
#pragma once

#include <cstdint>

#include "element.h"

namespace graddot {

// loss = lse - (1 - smoothing) x_label - smoothing · mean(x) + z_loss · lse², lse = log Σ exp(x).
struct CrossEntropy {
  Element element;  // of the logits; losses are fp32
  int64_t vocab;
  float label_smoothing, z_loss;
};

// Replaces a row of logits by the gradient of its loss, which it returns. Short elements need `memory`
// for a row in fp32.
using CrossEntropyRow = float (*)(const CrossEntropy& form, int64_t label, void* logits, float* memory);

// The same for `rows` rows, `stride` apart: losses and gradients are 0 where the label is
// `ignore_index`; other labels have been checked.
void cross_entropy_grad(CrossEntropyRow row, const CrossEntropy& form, int64_t rows,
                        const int64_t* labels, int64_t ignore_index, void* logits, int64_t stride,
                        float* losses);

}  // namespace graddot
