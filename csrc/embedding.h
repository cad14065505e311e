// The embedding's weight gradient and its dots with directions, free of torch. This file states
// the problem for both devices; the CPU's solution is in embedding.cpp, CUDA's in cuda/.
#pragma once

#include <cstdint>
#include <vector>

#include "tokens.h"

namespace graddot {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// (rows, cols, width) with unit stride along the width.
struct RowMatrix {
  const void* data;
  int64_t row_stride, col_stride;
};

// Pointers are to the memory of the device that the problem is solved on.
struct EmbeddingProblem {
  Dtype dtype;    // of grad, val_grad and direction
  int64_t width;  // d
  int64_t num_embeddings;
  int64_t padding_idx;  // -1: none
  IdMatrix ids;         // (N, T), checked
  RowMatrix grad;       // (N, T, d)

  // Where the K directions come from. Given: direction (K, num_embeddings, d). Otherwise they are
  // the gradients of the val tokens, the first val_rows[0] rows of which belong to direction 0,
  // and so on; they are made row by row where a training token needs them, never held.
  int64_t num_directions;                 // K
  RowMatrix direction{nullptr, 0, 0};     // null data: not given
  IdMatrix val_ids{};                     // (V, S), checked
  RowMatrix val_grad{nullptr, 0, 0};      // (V, S, d)
  std::vector<int64_t> val_rows;          // (K,)

  // Results, contiguous, fp64 for fp64 and else fp32. weight_grad may be null.
  void* weight_grad = nullptr;    // (num_embeddings, d)
  const double* scale = nullptr;  // of weight_grad; null: 1
  void* dots = nullptr;           // (K, N), or (K, N, T) with per_token
  bool per_token = false;

  bool direction_given() const { return direction.data != nullptr; }
};

// On the CPU. Bitwise the same result for any number of threads: each element is summed in token order.
void embedding_dots(const EmbeddingProblem& problem);

}  // namespace graddot
