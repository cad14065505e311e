// Compiled with -mavx512f.
#define GRADDOT_LANES 16
#include "cross_entropy_row.h"
#include "instruction_sets.h"
#include "linear_tile.h"
#include "norm_part.h"

const graddot::InstructionSet graddot::kAvx512{
    "AVX-512", {run, scratch, pack_act, packed_size, kBlockOut}, cross_entropy_row, norm_part};
