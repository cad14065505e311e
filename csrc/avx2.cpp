// Compiled with -mavx2 -mfma -mf16c.
#define GRADDOT_LANES 8
#include "kernels.h"

const graddot::InstructionSet graddot::kAvx2 = kernels("AVX2");
