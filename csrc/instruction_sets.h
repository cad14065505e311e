// The vector kernels, once for each instruction set that they are compiled for.
#pragma once

#include "cross_entropy.h"
#include "linear_wgrad.h"
#include "norm.h"

namespace graddot {

struct InstructionSet {
  const char* name;
  LinearKernel linear[kElements];
  CrossEntropyRow cross_entropy_row[kElements];
  NormPart norm_part;  // of fp32

  const LinearKernel& linear_of(Element element) const { return linear[static_cast<int64_t>(element)]; }
  CrossEntropyRow cross_entropy_row_of(Element element) const {
    return cross_entropy_row[static_cast<int64_t>(element)];
  }
};

extern const InstructionSet kAvx2, kAvx512, kAmx;  // avx2.cpp, avx512.cpp, amx.cpp; on x86-64 only

// The best that this processor has; null without AVX2.
const InstructionSet* instruction_set();

}  // namespace graddot
