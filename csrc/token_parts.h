// A sample's tokens in parts, of which the sums are made apart: what several threads share does not depend on
// how many they are, and no fp32 sum is longer.
#pragma once

#include <cstdint>

namespace graddot {

constexpr int64_t kTokensOfAPart = 128;

constexpr int64_t parts_of(int64_t tokens) {
  return tokens == 0 ? 1 : (tokens + kTokensOfAPart - 1) / kTokensOfAPart;
}

}  // namespace graddot
