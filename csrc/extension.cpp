// The CPU implementations of the embedding ops, in LibTorch's stable ABI. Schemas, fakes and the
// routes of other devices are in graddot_kernels/ops.py; the arithmetic is in embedding.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "binding.h"
#include "embedding.h"
#include "parallel.h"

namespace graddot {

void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, size, grain, body);
}

namespace {

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: throw std::invalid_argument("expected a gradient in fp32, fp64, bf16 or fp16");
  }
}

// Rows [begin, end) of ids, and from row begin on of a gradient with unit stride along its width.
IdMatrix id_matrix(const Tensor& ids, int64_t begin, int64_t end) {
  const auto offset = static_cast<int64_t>(ids.element_size()) * begin * ids.stride(0);
  return {static_cast<const char*>(ids.const_data_ptr()) + offset,
          ids.scalar_type() == ScalarType::Long, end - begin, ids.size(1), ids.stride(0),
          ids.stride(1)};
}

IdMatrix id_matrix(const Tensor& ids) { return id_matrix(ids, 0, ids.size(0)); }

RowMatrix row_matrix(const Tensor& x, int64_t begin = 0) {
  const auto offset = static_cast<int64_t>(x.element_size()) * begin * x.stride(0);
  return {static_cast<const char*>(x.const_data_ptr()) + offset, x.stride(0), x.stride(1)};
}

double scale_value(const std::optional<Tensor>& scale) {
  if (!scale) {
    return 1;
  }
  const Tensor value = torch::stable::to(*scale, ScalarType::Double);
  return *static_cast<const double*>(value.const_data_ptr());
}

// A weight gradient has the size of the table (154 MB for GPT-2), and the allocator gets it from
// the kernel anew every time: its first writes are page faults, which take several times as long
// as the writes. Huge pages take away most of them.
Tensor empty_table(const Tensor& like, int64_t num_embeddings, int64_t width) {
  Tensor table = empty_result(like, {num_embeddings, width});
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  const auto begin = reinterpret_cast<uintptr_t>(table.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<size_t>(table.numel()) * table.element_size();
  const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned + kHugePage <= end) {
    // Advice: where the kernel does not take it, nothing is lost.
    madvise(reinterpret_cast<void*>(aligned), (end - aligned) / kHugePage * kHugePage,
            MADV_HUGEPAGE);
  }
#endif
  return table;
}

EmbeddingProblem problem_of(const Tensor& ids, const Tensor& grad, int64_t num_embeddings,
                            int64_t padding_idx) {
  EmbeddingProblem problem{};
  problem.dtype = dtype_of(grad);
  problem.width = grad.size(2);
  problem.num_embeddings = num_embeddings;
  problem.padding_idx = padding_idx;
  problem.ids = id_matrix(ids);
  problem.grad = row_matrix(grad);
  return problem;
}

Tensor embedding_ghost_dot(const Tensor val_ids, const Tensor val_grad, const Tensor train_ids,
                           const Tensor train_grad, int64_t num_embeddings, int64_t padding_idx) {
  check_tensors(val_ids, val_grad);
  check_tensors(train_ids, train_grad);
  check_same_dtype(val_grad, train_grad);
  const Tensor val_rows = unit_stride(val_grad), rows = unit_stride(train_grad);
  EmbeddingProblem problem = problem_of(train_ids, rows, num_embeddings, padding_idx);
  problem.num_directions = 1;
  problem.val_ids = id_matrix(val_ids);
  problem.val_grad = row_matrix(val_rows);
  problem.val_target.assign(static_cast<size_t>(val_ids.size(0)), 0);
  check_ids(problem.val_ids, num_embeddings, "val_ids");
  check_ids(problem.ids, num_embeddings, "train_ids");
  Tensor dots = empty_result(rows, {rows.size(0)});
  problem.dots = dots.mutable_data_ptr();
  embedding_dots(problem);
  return dots;
}

Tensor embedding_direction_dot(const Tensor direction, const Tensor ids, const Tensor grad,
                               int64_t padding_idx, bool per_token) {
  check_tensors(ids, grad);
  check_same_dtype(direction, grad);
  const Tensor directions = unit_stride(direction), rows = unit_stride(grad);
  const int64_t k = directions.size(0), n = rows.size(0), t = rows.size(1);
  EmbeddingProblem problem = problem_of(ids, rows, directions.size(1), padding_idx);
  check_ids(problem.ids, problem.num_embeddings, "ids");
  const RowMatrix given = row_matrix(directions);
  problem.num_directions = k;
  problem.direction = &given;
  Tensor dots = per_token ? empty_result(rows, {k, n, t}) : empty_result(rows, {k, n});
  problem.dots = dots.mutable_data_ptr();
  problem.per_token = per_token;
  embedding_dots(problem);
  return dots;
}

std::tuple<Tensor, Tensor> embedding_wgrad_dot(const Tensor direction, const Tensor ids,
                                               const Tensor grad, int64_t padding_idx,
                                               const std::optional<Tensor> scale) {
  check_tensors(ids, grad);
  check_same_dtype(direction, grad);
  const Tensor directions = unit_stride(direction), rows = unit_stride(grad);
  EmbeddingProblem problem = problem_of(ids, rows, directions.size(1), padding_idx);
  check_ids(problem.ids, problem.num_embeddings, "ids");
  const RowMatrix given = row_matrix(directions);
  problem.num_directions = directions.size(0);
  problem.direction = &given;
  Tensor weight_grad = empty_table(rows, problem.num_embeddings, problem.width);
  Tensor dots = empty_result(rows, {problem.num_directions, rows.size(0)});
  problem.weight_grad = weight_grad.mutable_data_ptr();
  problem.scale = scale_value(scale);
  problem.dots = dots.mutable_data_ptr();
  embedding_dots(problem);
  return {weight_grad, dots};
}

std::tuple<Tensor, Tensor> embedding_joint_wgrad_dot(const Tensor ids, const Tensor grad,
                                                     const std::vector<int64_t> val_rows,
                                                     int64_t num_embeddings, int64_t padding_idx,
                                                     const std::optional<Tensor> scale) {
  check_tensors(ids, grad);
  const Tensor rows = unit_stride(grad);
  const std::vector<int64_t> targets = row_targets(val_rows, rows.size(0));
  const int64_t n = rows.size(0) - static_cast<int64_t>(targets.size());
  EmbeddingProblem problem = problem_of(ids, rows, num_embeddings, padding_idx);
  check_ids(problem.ids, num_embeddings, "ids");
  // The val rows are the last rows of the same matrices.
  problem.ids = id_matrix(ids, 0, n);
  problem.val_ids = id_matrix(ids, n, ids.size(0));
  problem.val_grad = row_matrix(rows, n);
  problem.num_directions = static_cast<int64_t>(val_rows.size());
  problem.val_target = targets;
  Tensor weight_grad = empty_table(rows, num_embeddings, problem.width);
  Tensor dots = empty_result(rows, {problem.num_directions, n});
  problem.weight_grad = weight_grad.mutable_data_ptr();
  problem.scale = scale_value(scale);
  problem.dots = dots.mutable_data_ptr();
  embedding_dots(problem);
  return {weight_grad, dots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(graddot, CPU, m) {
  m.impl("embedding_ghost_dot", TORCH_BOX(&embedding_ghost_dot));
  m.impl("embedding_direction_dot", TORCH_BOX(&embedding_direction_dot));
  m.impl("embedding_wgrad_dot", TORCH_BOX(&embedding_wgrad_dot));
  m.impl("embedding_joint_wgrad_dot", TORCH_BOX(&embedding_joint_wgrad_dot));
}

}  // namespace graddot

// What was built, for graddot_kernels.build_info(). The macros are set by CMakeLists.txt.
extern "C" __attribute__((visibility("default"))) const char* graddot_build() {
  return "{\"compiler\": \"" GRADDOT_COMPILER "\", \"cuda_compiler\": \"" GRADDOT_CUDA_COMPILER
         "\", \"cuda_architectures\": \"" GRADDOT_CUDA_ARCHITECTURES
         "\", \"torch\": \"" GRADDOT_TORCH "\"}";
}
