// What the CPU and the CUDA bindings share: checks and allocation, in LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <vector>

namespace graddot {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The public functions have checked everything already; these guard the memory against a direct
// call of an op. std::invalid_argument arrives in Python as ValueError.
inline void check_tensors(const Tensor& ids, const Tensor& grad) {
  const ScalarType id_type = ids.scalar_type();
  if (id_type != ScalarType::Long && id_type != ScalarType::Int) {
    throw std::invalid_argument("expected ids in int32 or int64");
  }
  if (ids.dim() != 2 || grad.dim() != 3 || ids.size(0) != grad.size(0) ||
      ids.size(1) != grad.size(1)) {
    throw std::invalid_argument("expected ids (N, T) and grad (N, T, d)");
  }
}

inline void check_same_dtype(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.dim() != 3 || a.size(2) != b.size(2)) {
    throw std::invalid_argument("expected gradients and directions of one dtype and width");
  }
}

// x itself, or a copy whose last dimension has stride 1.
inline Tensor unit_stride(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// Results are fp64 for fp64 and else fp32.
inline Tensor empty_result(const Tensor& like, std::initializer_list<int64_t> shape) {
  const bool is_double = like.scalar_type() == ScalarType::Double;
  const std::vector<int64_t> sizes(shape);
  return torch::stable::empty(sizes, is_double ? ScalarType::Double : ScalarType::Float,
                              std::nullopt, like.device());
}

// The target of every val row, the last of `rows` rows: val_rows[k] of them belong to target k.
inline std::vector<int64_t> row_targets(const std::vector<int64_t>& val_rows, int64_t rows) {
  std::vector<int64_t> targets;
  for (size_t k = 0; k < val_rows.size(); ++k) {
    if (val_rows[k] < 0 || val_rows[k] > rows - static_cast<int64_t>(targets.size())) {
      throw std::invalid_argument("expected val_rows that sum to at most the number of rows");
    }
    targets.insert(targets.end(), static_cast<size_t>(val_rows[k]), static_cast<int64_t>(k));
  }
  return targets;
}

}  // namespace graddot
