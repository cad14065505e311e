// All kernels of one instruction set, as the translation units that include this are compiled.
#pragma once

#include "column_sums_part.h"
#include "cross_entropy_row.h"
#include "instruction_sets.h"
#include "linear_fma.h"
#include "norm_part.h"

namespace {

constexpr graddot::InstructionSet kernels(const char* name, const graddot::LinearKernel& of_fp32,
                                          const graddot::LinearKernel& of_bf16, bool products) {
  return {name,
          {of_fp32, of_bf16, LinearKernelOf<MultiplyAdd<Fp16>>::kernel()},
          LinearKernelOf<MultiplyAdd<float>>::kernel(),
          products,
          {cross_entropy_row, cross_entropy_row_of<Bf16>, cross_entropy_row_of<Fp16>},
          norm_part,
          {column_sums_part<float>, column_sums_part<Bf16>, column_sums_part<Fp16>}};
}

constexpr graddot::InstructionSet kernels(const char* name) {
  return kernels(name, LinearKernelOf<MultiplyAdd<float>>::kernel(),
                 LinearKernelOf<MultiplyAdd<Bf16>>::kernel(), false);
}

}  // namespace
