// One row of softmax cross-entropy: three passes over a row that stays in cache.
#pragma once

#include <cmath>

#include "cross_entropy.h"
#include "vector.h"

namespace {

// exp(x) for x <= 0, within 2 ulp: 2^n · exp(r), r in ±ln(2)/2, exp(r) by its Taylor polynomial.
inline Vector exp_of_negative(const Vector& x) {
  const Vector magic = all(12582912.0F);  // 1.5 · 2^23: adding it rounds to an integer
  const Vector shifted = x * 1.44269504F + magic;
  const Vector n = shifted - magic;
  const Vector r = x - n * 0.693359375F + n * 2.12194440e-4F;  // ln 2 in two parts
  Vector poly = all(1.0F / 5040);
  poly = poly * r + 1.0F / 720;
  poly = poly * r + 1.0F / 120;
  poly = poly * r + 1.0F / 24;
  poly = poly * r + 1.0F / 6;
  poly = poly * r + 0.5F;
  poly = poly * r + 1.0F;
  poly = poly * r + 1.0F;
  const IntVector power = (reinterpret_cast<const IntVector&>(shifted) << 23) + (127 << 23);
  const Vector result = poly * reinterpret_cast<const Vector&>(power);
  return x < -87.0F ? Vector{} : result;  // NaN stays NaN
}

float largest_of(const float* x, int64_t size) {
  float result = x[0];
  int64_t i = 0;
  if (size >= kLanes) {
    Vector best = load(x);
    for (i = kLanes; i + kLanes <= size; i += kLanes) {
      const Vector next = load(x + i);
      best = next > best ? next : best;
    }
    for (int lane = 0; lane < kLanes; ++lane) result = best[lane] > result ? best[lane] : result;
  }
  for (; i < size; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// Σ x, in double from blocks: fp32 sums of a whole vocabulary would lose digits.
template <class Element>
double sum_of(int64_t size, const Element& element) {
  constexpr int64_t kSumBlock = 64 * kLanes;
  double sum = 0;
  for (int64_t begin = 0; begin < size; begin += kSumBlock) {
    const int64_t end = smaller(begin + kSumBlock, size);
    Vector part{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) part += element(i, kLanes);
    if (i < end) part += element(i, end - i);
    for (int lane = 0; lane < kLanes; ++lane) sum += part[lane];
  }
  return sum;
}

float cross_entropy_of(const graddot::CrossEntropy& form, int64_t label, float* logits) {
  const int64_t vocab = form.vocab;
  const float smoothing = form.label_smoothing;
  double loss = -(1.0 - smoothing) * logits[label];
  if (smoothing != 0) {
    const auto element = [&](int64_t i, int64_t n) { return load_some(logits + i, n); };
    loss -= smoothing * sum_of(vocab, element) / static_cast<double>(vocab);
  }
  const float most = largest_of(logits, vocab);
  const double sum = sum_of(vocab, [&](int64_t i, int64_t n) {
    const Vector e = exp_of_negative(load_some(logits + i, n) - most);
    store_some(logits + i, e, n);
    return n == kLanes ? e : load_some(logits + i, n);
  });
  const double lse = most + std::log(sum);
  const Vector factor = all(static_cast<float>((1 + 2 * form.z_loss * lse) / sum));
  const Vector spread = all(smoothing / static_cast<float>(vocab));
  for (int64_t i = 0; i < vocab; i += kLanes) {
    const int64_t n = smaller(kLanes, vocab - i);
    store_some(logits + i, load_some(logits + i, n) * factor - spread, n);
  }
  logits[label] -= 1.0F - smoothing;
  return static_cast<float>(loss + lse + form.z_loss * lse * lse);
}

float cross_entropy_row(const graddot::CrossEntropy& form, int64_t label, void* logits, float*) {
  return cross_entropy_of(form, label, static_cast<float*>(logits));
}

// Rounded once, at the end.
template <class Short>
float cross_entropy_row_of(const graddot::CrossEntropy& form, int64_t label, void* logits, float* memory) {
  auto* row = static_cast<Short*>(logits);
  for (int64_t i = 0; i < form.vocab; i += kLanes) {
    const int64_t n = smaller(kLanes, form.vocab - i);
    store_some(memory + i, load_some(row + i, n), n);
  }
  const float loss = cross_entropy_of(form, label, memory);
  for (int64_t i = 0; i < form.vocab; i += kLanes) {
    const int64_t n = smaller(kLanes, form.vocab - i);
    store_some(row + i, load_some(memory + i, n), n);
  }
  return loss;
}

}  // namespace
