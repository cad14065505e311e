// Compiled with -mavx512f -mf16c.
#define GRADDOT_LANES 16
#include "kernels.h"

const graddot::InstructionSet graddot::kAvx512 = kernels("AVX-512");
