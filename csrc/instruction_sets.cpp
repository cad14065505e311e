#include "instruction_sets.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace graddot {
namespace {

#ifdef __x86_64__

struct Answer {
  unsigned a = 0, b = 0, c = 0, d = 0;

  explicit Answer(unsigned leaf) {
    if (__get_cpuid_count(leaf, 0, &a, &b, &c, &d) == 0) a = b = c = d = 0;
  }
};

// Conversions of fp16.
bool has_f16c() {
  constexpr unsigned kF16c = 1U << 29;
  return (Answer(1).c & kF16c) != 0;
}

// Its products of bf16. Linux lets a process have the tiles, which enlarge what it saves of a thread,
// on demand.
bool has_amx() {
#ifdef __linux__
  constexpr unsigned kBf16 = 1U << 22, kTiles = 1U << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  const unsigned features = Answer(7).d;
  return (features & kBf16) != 0 && (features & kTiles) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const InstructionSet* best() {
  if (__builtin_cpu_supports("avx512f")) return has_amx() ? &kAmx : &kAvx512;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  return avx2 ? &kAvx2 : nullptr;
}

#else

const InstructionSet* best() { return nullptr; }

#endif

}  // namespace

const InstructionSet* instruction_set() {
  static const InstructionSet* const set = best();
  return set;
}

}  // namespace graddot
