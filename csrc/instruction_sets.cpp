#include "instruction_sets.h"

namespace graddot {

const InstructionSet* instruction_set() {
#ifdef __x86_64__
  static const InstructionSet* const best =
      __builtin_cpu_supports("avx512f") ? &kAvx512
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2
                                                                        : nullptr;
  return best;
#else
  return nullptr;
#endif
}

}  // namespace graddot
