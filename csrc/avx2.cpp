// Compiled with -mavx2 -mfma.
#define GRADDOT_LANES 8
#include "cross_entropy_row.h"
#include "instruction_sets.h"
#include "linear_tile.h"
#include "norm_part.h"

const graddot::InstructionSet graddot::kAvx2{
    "AVX2", {run, scratch, pack_act, packed_size, kBlockOut}, cross_entropy_row, norm_part};
