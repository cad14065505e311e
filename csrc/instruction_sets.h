// The vector kernels, once for each instruction set that they are compiled for.
#pragma once

#include "column_sums.h"
#include "cross_entropy.h"
#include "linear_wgrad.h"
#include "norm.h"

namespace graddot {

struct InstructionSet {
  const char* name;
  LinearKernel linear[kElements];
  LinearKernel short_linear;  // of fp32, where samples have few tokens
  bool products;              // whether linear[kFp32] is for all products: faster than PyTorch's
  CrossEntropyRow cross_entropy_row[kElements];
  NormPart norm_part;  // of fp32
  ColumnSumsPart column_sums_part[kElements];

  const LinearKernel& linear_of(const LinearProblem& p) const {
    constexpr int64_t kFew = 24;
    const bool strided = p.act.column_stride != 1 || p.grad.column_stride != 1;
    const bool few = p.element == Element::kFp32 && p.tokens < kFew && !strided;
    return few ? short_linear : linear[static_cast<int64_t>(p.element)];
  }
  CrossEntropyRow cross_entropy_row_of(Element element) const {
    return cross_entropy_row[static_cast<int64_t>(element)];
  }
  ColumnSumsPart column_sums_part_of(Element element) const {
    return column_sums_part[static_cast<int64_t>(element)];
  }
};

extern const InstructionSet kAvx2, kAvx512, kAmx;  // avx2.cpp, avx512.cpp, amx.cpp; on x86-64 only

// The best that this processor has; null without AVX2.
const InstructionSet* instruction_set();

}  // namespace graddot
