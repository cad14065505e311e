// A few tokens of a norm's backward: one pass over each for the sums, one for the gradient of x.
#pragma once

#include <cmath>

#include "norm.h"
#include "vector.h"

namespace {

inline float sum_of_lanes(const Vector& x) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
  return static_cast<float>(sum);
}

inline float norm_rstd(const graddot::NormProblem& p, int64_t token, const float* x) {
  if (p.rstd != nullptr) return p.rstd[token];
  if (p.eps < 0) return 1;
  Vector squares{};
  for (int64_t i = 0; i < p.d; i += kLanes) {
    const Vector some = load_some(x + i, smaller(kLanes, p.d - i));
    squares += some * some;
  }
  return 1 / std::sqrt(sum_of_lanes(squares) / static_cast<float>(p.d) + p.eps);
}

void norm_part(const graddot::NormProblem& p, int64_t row, int64_t part) {
  const int64_t at = (row * p.parts() + part) * p.d;
  float *weight_row = p.weight_rows + at, *bias_row = p.bias_rows + at;
  for (int64_t i = 0; i < p.d; ++i) weight_row[i] = bias_row[i] = 0;
  const int64_t first = part * graddot::kTokensOfAPart;
  const int64_t last = smaller(first + graddot::kTokensOfAPart, p.tokens);
  for (int64_t token = row * p.tokens + first; token < row * p.tokens + last; ++token) {
    const float *x = p.x + token * p.d, *grad = p.grad + token * p.d;
    const Vector mean = all(p.mean == nullptr ? 0 : p.mean[token]);
    const Vector rstd = all(norm_rstd(p, token, x)), offset = all(p.offset);
    const bool wanted = p.x_grad != nullptr;
    Vector sum{}, product{};
    for (int64_t i = 0; i < p.d; i += kLanes) {
      const int64_t n = smaller(kLanes, p.d - i);
      const Vector g = load_some(grad + i, n);
      const Vector normed = (load_some(x + i, n) - mean) * rstd;
      store_some(weight_row + i, load_some(weight_row + i, n) + g * normed, n);
      store_some(bias_row + i, load_some(bias_row + i, n) + g, n);
      if (wanted) {
        const Vector scaled = g * (load_some(p.weight + i, n) + offset);
        sum += scaled;
        product += scaled * normed;
      }
    }
    if (!wanted) continue;
    const auto d = static_cast<float>(p.d);
    const Vector along = all(sum_of_lanes(product) / d);
    const Vector level = all(p.mean == nullptr ? 0 : sum_of_lanes(sum) / d);
    for (int64_t i = 0; i < p.d; i += kLanes) {
      const int64_t n = smaller(kLanes, p.d - i);
      const Vector scaled = load_some(grad + i, n) * (load_some(p.weight + i, n) + offset);
      const Vector normed = (load_some(x + i, n) - mean) * rstd;
      store_some(p.x_grad + token * p.d + i, (scaled - normed * along - level) * rstd, n);
    }
  }
}

}  // namespace
