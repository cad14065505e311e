#define GRADDOT_LANES 16
#include "cross_entropy_row.h"
#include "instruction_sets.h"
#include "linear_tile.h"
#include "norm_part.h"

extern const graddot::InstructionSet kSixteenLanes;
const graddot::InstructionSet kSixteenLanes{
    "sixteen lanes", {run, scratch, pack_act, packed_size, kBlockOut}, cross_entropy_row, norm_part};
