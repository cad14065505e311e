// The backward of layer and RMS norms with every sample's own parameter gradients. Free of torch.
#pragma once

#include <cstdint>

#include "token_parts.h"

namespace graddot {

// Of y = x̂ · (offset + weight) + bias, x̂ = (x - mean) · rstd, and grad, all (rows, tokens, d) and
// contiguous.
struct NormProblem {
  int64_t rows, tokens, d;
  const float *x, *grad;
  const float* weight;  // (d); null where there is no x_grad
  float offset;
  const float* mean;  // (rows, tokens); null: 0, also in x_grad
  const float* rstd;  // (rows, tokens); null: (mean(x²) + eps)^-½, or 1 where eps is negative
  float eps;
  float* x_grad;                    // (rows, tokens, d), or null
  float *weight_rows, *bias_rows;  // Σ grad · x̂ and Σ grad, (rows, parts, d)

  int64_t parts() const { return parts_of(tokens); }
};

using NormPart = void (*)(const NormProblem& problem, int64_t row, int64_t part);

void norm_backward(NormPart run, const NormProblem& problem);

}  // namespace graddot
