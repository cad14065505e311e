#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda_on_host.h"

namespace cub {

struct DeviceRadixSort {
  template <class Key, class Value>
  static cudaError_t SortPairs(void* temporary, size_t& bytes, const Key* keys, Key* sorted_keys,
                               const Value* values, Value* sorted_values, int size, int begin_bit,
                               int end_bit, cudaStream_t) {
    bytes = 1;
    if (!temporary || cuda_on_host::cub_error) {
      return cuda_on_host::cub_error;
    }
    const auto digits = [&](int i) {
      return static_cast<uint64_t>(keys[i]) << (64 - end_bit) >> (64 - end_bit + begin_bit);
    };
    std::vector<int> order(static_cast<size_t>(size));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return digits(i) < digits(j); });
    for (int i = 0; i < size; ++i) {
      sorted_keys[i] = keys[order[static_cast<size_t>(i)]];
      sorted_values[i] = values[order[static_cast<size_t>(i)]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
