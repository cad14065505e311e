// The vector kernels, once for each instruction set that they are compiled for.
#pragma once

#include "cross_entropy.h"
#include "linear_wgrad.h"
#include "norm.h"

namespace graddot {

struct InstructionSet {
  const char* name;
  LinearKernel linear;
  CrossEntropyRow cross_entropy_row;
  NormPart norm_part;
};

extern const InstructionSet kAvx2, kAvx512;  // avx2.cpp, avx512.cpp; on x86-64 only

// The best that this processor has; null without AVX2.
const InstructionSet* instruction_set();

}  // namespace graddot
