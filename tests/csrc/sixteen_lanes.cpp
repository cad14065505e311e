#define GRADDOT_LANES 16
#include "kernels.h"
#include "linear_amx.h"

extern const graddot::InstructionSet kSixteenLanes;
const graddot::InstructionSet kSixteenLanes = kernels("sixteen lanes, AMX in plain C++", amx_kernel<AmxOfFp32>(), amx_kernel<AmxOfBf16>(), true);
