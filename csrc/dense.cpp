// The vector kernels as plain C functions, which graddot_kernels/cpu_kernels.py calls with the
// addresses of tensors that it has checked, where graddot_instruction_set() names any.

#include <exception>

#include "huge_pages.h"
#include "instruction_sets.h"

#define GRADDOT_EXPORT extern "C" __attribute__((visibility("default")))

// "" if there is none.
GRADDOT_EXPORT const char* graddot_instruction_set() {
  const auto* set = graddot::instruction_set();
  return set == nullptr ? "" : set->name;
}

// Whether graddot_linear_wgrad_dot takes columns of any stride, and is faster than PyTorch's products.
GRADDOT_EXPORT bool graddot_products() {
  const auto* set = graddot::instruction_set();
  return set != nullptr && set->products;
}

// Whether there was memory for it: nothing else throws, and no exception may leave a C function.
GRADDOT_EXPORT bool graddot_linear_wgrad_dot(const graddot::LinearProblem* problem,
                                             int64_t threads) {
  try {
    graddot::linear_wgrad_dot(graddot::instruction_set()->linear_of(*problem), *problem, threads);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// The same.
GRADDOT_EXPORT bool graddot_cross_entropy_grad(const graddot::CrossEntropy* form, int64_t rows,
                                               const int64_t* labels, int64_t ignore_index,
                                               void* logits, int64_t stride,
                                               float* losses) {
  try {
    const auto row = graddot::instruction_set()->cross_entropy_row_of(form->element);
    graddot::cross_entropy_grad(row, *form, rows, labels, ignore_index, logits, stride, losses);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

GRADDOT_EXPORT void graddot_norm_backward(const graddot::NormProblem* problem) {
  graddot::norm_backward(graddot::instruction_set()->norm_part, *problem);
}

GRADDOT_EXPORT void graddot_column_sums(const graddot::ColumnSums* problem) {
  const auto run = graddot::instruction_set()->column_sums_part_of(problem->element);
  graddot::column_sums(run, *problem);
}

GRADDOT_EXPORT void graddot_advise_huge_pages(void* data, int64_t size) {
  graddot::advise_huge_pages(data, size);
}
