// The embedding's weight gradient and its dots with directions, on a CPU, free of torch.
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

struct EmbeddingProblem {
  Dtype dtype;    // of grad, val_grad and direction
  int64_t width;  // d
  int64_t num_embeddings;
  int64_t padding_idx;  // -1: none
  IdMatrix ids;         // (N, T), checked
  RowMatrix grad;       // (N, T, d)

  // Where the K directions come from. Given: direction (K, num_embeddings, d). Otherwise they are
  // the gradients of the val tokens, row v of which belongs to direction val_target[v]; they are
  // made row by row where a training token needs them, never held.
  int64_t num_directions;  // K
  const RowMatrix* direction = nullptr;
  IdMatrix val_ids{};  // (V, S), checked
  RowMatrix val_grad{};
  std::vector<int64_t> val_target;

  // Results, contiguous, fp64 for fp64 and else fp32. weight_grad may be null.
  void* weight_grad = nullptr;  // (num_embeddings, d)
  double scale = 1;             // of weight_grad
  void* dots = nullptr;         // (K, N), or (K, N, T) with per_token
  bool per_token = false;
};

// Bitwise the same result for any number of threads: each element is summed in token order.
void embedding_dots(const EmbeddingProblem& problem);

}  // namespace graddot
