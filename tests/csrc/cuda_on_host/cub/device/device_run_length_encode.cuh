#pragma once

#include "cuda_on_host.h"

namespace cub {

struct DeviceRunLengthEncode {
  template <class Key, class Count>
  static cudaError_t Encode(void* temporary, size_t& bytes, const Key* keys, Key* unique,
                            Count* counts, int* runs, int size, cudaStream_t) {
    bytes = 1;
    if (!temporary || cuda_on_host::cub_error) {
      return cuda_on_host::cub_error;
    }
    *runs = 0;
    for (int i = 0; i < size; ++i) {
      if (i == 0 || keys[i] != keys[i - 1]) {
        unique[*runs] = keys[i];
        counts[(*runs)++] = 0;
      }
      ++counts[*runs - 1];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
