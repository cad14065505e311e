// Compiled with -mavx512f -mf16c -mamx-tile -mamx-bf16.
#define GRADDOT_LANES 16
#include "kernels.h"
#include "linear_amx.h"

const graddot::InstructionSet graddot::kAmx = kernels("AVX-512 with AMX", amx_kernel<AmxOfFp32>(), amx_kernel<AmxOfBf16>(), true);
