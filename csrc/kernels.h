// All kernels of one instruction set, as the translation units that include this are compiled.
#pragma once

#include "cross_entropy_row.h"
#include "instruction_sets.h"
#include "linear_fma.h"
#include "norm_part.h"

namespace {

constexpr graddot::InstructionSet kernels(const char* name, const graddot::LinearKernel& of_bf16) {
  return {name,
          {LinearKernelOf<MultiplyAdd<float>>::kernel(), of_bf16, LinearKernelOf<MultiplyAdd<Fp16>>::kernel()},
          {cross_entropy_row, cross_entropy_row_of<Bf16>, cross_entropy_row_of<Fp16>},
          norm_part};
}

}  // namespace
