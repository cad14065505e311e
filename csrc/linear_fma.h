// Linear weight gradients by the processor's multiply-adds: panels of fp32, whatever the element.
#pragma once

#include "linear_tile.h"

namespace {

inline float widened(float x) { return x; }

inline float widened(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

inline float widened(Fp16 x) { return _cvtsh_ss(x.bits); }

template <class ElementType>
struct MultiplyAdd {
  using Element = ElementType;
  using Packed = float;
  // 6 x 2 sums fill 12 of AVX2's 16 registers, 12 x 2 fill 24 of AVX-512's 32.
  static constexpr int kBlockOut = kLanes == 8 ? 6 : 12;
  static constexpr int kTokens = 1, kRowsPerToken = 6;
  static constexpr bool kWritesLater = false;
  using Sums = Vector[kBlockOut][2];

  // A few tokens at a time: rows lie far apart, often on the same few sets of the cache.
  template <int panel>
  static void pack(const Element* rows, const Activations& x, int64_t tokens, int64_t cols, float* panels,
                   int64_t stride) {
    constexpr int64_t kTogether = 16;
    for (int64_t first = 0; first < tokens; first += kTogether) {
      const int64_t last = smaller(first + kTogether, tokens);
      for (int64_t begin = 0; begin < cols; begin += panel) {
        const Element* from = rows + first * x.token_stride + begin;
        float* to = panels + begin / panel * stride + first * panel;
        const int64_t width = smaller(panel, cols - begin);
        for (int64_t t = first; t < last; ++t, from += x.token_stride, to += panel) {
          if (width == panel) {
            for (int c = 0; c < panel; ++c) to[c] = widened(from[c]);
          } else {
            for (int c = 0; c < panel; ++c) to[c] = c < width ? widened(from[c]) : 0.0F;
          }
        }
      }
    }
  }

  static constexpr auto pack_act = pack<kBlockIn>;
  static constexpr auto pack_grad = pack<kBlockOut>;

  static void multiply_token(const float* grad, const float* act, Sums& sums) {
    const Vector left = load(act), right = load(act + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kBlockOut; ++i) {
      const Vector g = all(grad[i]);
      sums[i][0] += g * left;
      sums[i][1] += g * right;
    }
  }

  // Block (i, j) of the sum and of the directions, which lie further away than the panels, comes near
  // meanwhile, a cache line with every token: 5 to 20 % of the time.
  static void multiply(const float* grad, const float* act, int64_t tokens, const Target& to,
                       int64_t i, int64_t j, Sums& sums) {
    for (int o = 0; o < kBlockOut; ++o) {
      sums[o][0] = sums[o][1] = Vector{};
    }
    int64_t t = 0;
    const auto multiply_and_fetch = [&](const float* line, int64_t floats) {
      constexpr int64_t kFloats = kCacheLine / sizeof(float);
      for (const int64_t end = smaller(t + floats / kFloats, tokens); t < end; ++t) {
        __builtin_prefetch(line);
        line += kFloats;
        multiply_token(grad + t * kBlockOut, act + t * kBlockIn, sums);
      }
    };
    multiply_and_fetch(to.sum.at(i, j), to.sum.size);
    multiply_and_fetch(to.directions.at(i, j), to.directions.count * to.directions.size);
#pragma GCC unroll 4
    for (; t < tokens; ++t) multiply_token(grad + t * kBlockOut, act + t * kBlockIn, sums);
  }
};

}  // namespace
