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

// Bits of cpuid's answer.
constexpr unsigned kF16c = 1U << 29, kOsXsave = 1U << 27;                  // leaf 1, ecx
constexpr unsigned kAvx512Bw = 1U << 30, kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;  // leaf 7, ebx and edx

bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kF16c) != 0;
}

// Linux gives a process the tiles' registers, which enlarge what it saves of a thread, on demand.
bool has_amx() {
#ifdef __linux__
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsXsave) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((b & kAvx512Bw) == 0 || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
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
