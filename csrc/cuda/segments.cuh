// Sorts tokens by id on the device and cuts them into segments of equal id.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_run_length_encode.cuh>
#include <cub/device/device_scan.cuh>
#include <stdexcept>
#include <string>

#include "../tokens.h"

namespace graddot {

constexpr int kThreads = 256;

// A launch by function call: the kernels also run, as plain C++, where there is no GPU
// (tests/csrc/cuda_on_host). Errors are left to cudaGetLastError.
template <class... P, class... A>
void launch_kernel(cudaStream_t stream, int64_t blocks, int threads, void (*kernel)(P...),
                   const A&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, args...);
}

// What cub refuses it says by its result alone: cudaGetLastError does not know.
inline void check_cub(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("graddot embedding kernels: cub: ") +
                             cudaGetErrorString(error));
  }
}

inline int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// Device memory handed out in order; without memory, only counted.
class Arena {
 public:
  explicit Arena(void* data) : data_(static_cast<char*>(data)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t offset = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return data_ ? reinterpret_cast<T*>(data_ + offset) : nullptr;
  }

  size_t used() const { return used_; }

 private:
  char* data_;
  size_t used_ = 0;
};

// Arrays of as many segments as *size says, in ascending order of ids; padding tokens, if any, are
// the last segment, with id num_embeddings.
struct Segments {
  const int64_t* ids;
  const int* counts;
  const int* begins;  // into tokens
  const int* tokens;  // row * cols + col, in order within a segment
  const int* size;
};

static __global__ void make_keys(IdMatrix ids, int64_t padding_idx, int64_t num_embeddings,
                                 int64_t* keys, int* tokens) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= ids.rows * ids.cols) {
    return;
  }
  const int64_t row = i / ids.cols, col = i % ids.cols;
  const int64_t offset = row * ids.row_stride + col * ids.col_stride;
  const int64_t id = ids.is_int64 ? static_cast<const int64_t*>(ids.data)[offset]
                                  : static_cast<const int32_t*>(ids.data)[offset];
  if (id < 0 || id >= num_embeddings) {
    printf("graddot: ids[%lld, %lld] is %lld, outside the table of %lld embeddings\n",
           static_cast<long long>(row), static_cast<long long>(col), static_cast<long long>(id),
           static_cast<long long>(num_embeddings));
    __trap();
  }
  keys[i] = id == padding_idx ? num_embeddings : id;
  tokens[i] = static_cast<int>(i);
}

// Sorts up to `capacity` tokens in memory of the arena.
class TokenSorter {
 public:
  TokenSorter(Arena& arena, int64_t capacity, int64_t num_embeddings)
      : num_embeddings_(num_embeddings), capacity_(static_cast<int>(capacity)) {
    if (capacity > INT32_MAX) {
      throw std::invalid_argument("expected fewer than 2**31 tokens");
    }
    // Known without a look at the ids; and a given direction would have no memory to be known by.
    if (capacity > 0 && num_embeddings == 0) {
      throw std::out_of_range("expected no ids: they are outside the table of 0 embeddings");
    }
    while (key_bits_ < 63 && (num_embeddings >> key_bits_) > 0) {
      ++key_bits_;
    }
    keys_ = arena.take<int64_t>(capacity);
    tokens_ = arena.take<int>(capacity);
    sorted_keys_ = arena.take<int64_t>(capacity);
    sorted_tokens_ = arena.take<int>(capacity);
    ids_ = arena.take<int64_t>(capacity);
    counts_ = arena.take<int>(capacity);
    begins_ = arena.take<int>(capacity);
    size_ = arena.take<int>(1);
    size_t bytes = 0;
    for (const Step step : {&TokenSorter::sort_pairs, &TokenSorter::encode, &TokenSorter::scan}) {
      check_cub((this->*step)(nullptr, bytes, capacity_, nullptr));
      temporary_bytes_ = bytes > temporary_bytes_ ? bytes : temporary_bytes_;
    }
    temporary_ = arena.take<char>(static_cast<int64_t>(temporary_bytes_));
  }

  Segments sort(const IdMatrix& ids, int64_t padding_idx, cudaStream_t stream) const {
    const int size = static_cast<int>(ids.rows * ids.cols);
    launch_kernel(stream, blocks_for(size), kThreads, make_keys, ids, padding_idx, num_embeddings_,
                  keys_, tokens_);
    for (const Step step : {&TokenSorter::sort_pairs, &TokenSorter::encode, &TokenSorter::scan}) {
      size_t bytes = temporary_bytes_;
      check_cub((this->*step)(temporary_, bytes, size, stream));
    }
    return {ids_, counts_, begins_, sorted_tokens_, size_};
  }

 private:
  // Without temporary memory, a step only says how many bytes of it it needs.
  using Step = cudaError_t (TokenSorter::*)(void*, size_t&, int, cudaStream_t) const;

  cudaError_t sort_pairs(void* temporary, size_t& bytes, int size, cudaStream_t stream) const {
    return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys_, sorted_keys_, tokens_,
                                           sorted_tokens_, size, 0, key_bits_, stream);
  }
  cudaError_t encode(void* temporary, size_t& bytes, int size, cudaStream_t stream) const {
    return cub::DeviceRunLengthEncode::Encode(temporary, bytes, sorted_keys_, ids_, counts_, size_,
                                              size, stream);
  }
  // Over all `size` counts, of which only the first *size_ mean anything: no count before a
  // segment's own is beyond them.
  cudaError_t scan(void* temporary, size_t& bytes, int size, cudaStream_t stream) const {
    return cub::DeviceScan::ExclusiveSum(temporary, bytes, counts_, begins_, size, stream);
  }

  int64_t num_embeddings_;
  int capacity_;
  int key_bits_ = 0;
  int64_t *keys_, *sorted_keys_, *ids_;
  int *tokens_, *sorted_tokens_, *counts_, *begins_, *size_;
  size_t temporary_bytes_ = 0;
  char* temporary_;
};

static __global__ void match_kernel(Segments train, Segments val, int* match) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= *train.size) {
    return;
  }
  const int64_t id = train.ids[i];
  int low = 0, high = *val.size;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (val.ids[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  match[i] = low < *val.size && val.ids[low] == id ? low : -1;
}

// The val segment of every train segment's id, -1 for none.
static void match_segments(const Segments& train, const Segments& val, int64_t capacity,
                           int* match, cudaStream_t stream) {
  launch_kernel(stream, blocks_for(capacity), kThreads, match_kernel, train, val, match);
}

}  // namespace graddot
