#pragma once

#include "cuda_on_host.h"

namespace cub {

struct DeviceScan {
  // Unsigned sums: what lies behind the last run is arbitrary and may wrap around.
  static cudaError_t ExclusiveSum(void* temporary, size_t& bytes, const int* in, int* out, int size,
                                  cudaStream_t) {
    bytes = 1;
    unsigned sum = 0;
    for (int i = 0; temporary && i < size; ++i) {
      out[i] = static_cast<int>(sum);
      sum += static_cast<unsigned>(in[i]);
    }
    return cuda_on_host::cub_error;
  }
};

}  // namespace cub
