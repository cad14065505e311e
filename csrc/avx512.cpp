// Compiled with -mavx512f -mf16c.
#define GRADDOT_LANES 16
#include "cross_entropy_row.h"
#include "instruction_sets.h"
#include "linear_fma.h"
#include "norm_part.h"

const graddot::InstructionSet graddot::kAvx512{
    "AVX-512",
    {LinearKernelOf<MultiplyAdd<float>>::kernel(), LinearKernelOf<MultiplyAdd<Bf16>>::kernel(),
     LinearKernelOf<MultiplyAdd<Fp16>>::kernel()},
    {cross_entropy_row, cross_entropy_row_of<Bf16>, cross_entropy_row_of<Fp16>},
    norm_part};
