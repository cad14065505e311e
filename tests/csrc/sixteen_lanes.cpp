#define GRADDOT_LANES 16
#include "cross_entropy_row.h"
#include "instruction_sets.h"
#include "linear_amx.h"
#include "linear_fma.h"
#include "norm_part.h"

extern const graddot::InstructionSet kSixteenLanes;
const graddot::InstructionSet kSixteenLanes{
    "sixteen lanes, AMX in plain C++",
    {LinearKernelOf<MultiplyAdd<float>>::kernel(), amx_kernel(),
     LinearKernelOf<MultiplyAdd<Fp16>>::kernel()},
    {cross_entropy_row, cross_entropy_row_of<Bf16>, cross_entropy_row_of<Fp16>},
    norm_part};
