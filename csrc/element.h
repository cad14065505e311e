// The dtypes of activations, gradients and logits that the vector kernels take.
#pragma once

#include <cstdint>

namespace graddot {

enum class Element : int64_t { kFp32, kBf16, kFp16 };
constexpr int64_t kElements = 3;

constexpr int64_t size_of(Element element) { return element == Element::kFp32 ? 4 : 2; }

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

}  // namespace graddot
