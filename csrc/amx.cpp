// Compiled with -mavx512f -mf16c -mamx-tile -mamx-bf16.
#define GRADDOT_LANES 16
#include "cross_entropy_row.h"
#include "instruction_sets.h"
#include "linear_amx.h"
#include "linear_fma.h"
#include "norm_part.h"

const graddot::InstructionSet graddot::kAmx{
    "AVX-512 with AMX",
    {LinearKernelOf<MultiplyAdd<float>>::kernel(), amx_kernel(),
     LinearKernelOf<MultiplyAdd<Fp16>>::kernel()},
    {cross_entropy_row, cross_entropy_row_of<Bf16>, cross_entropy_row_of<Fp16>},
    norm_part};
