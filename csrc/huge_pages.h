// Large results on a CPU.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace graddot {

// A weight gradient has the size of its table (154 MB for GPT-2), and the CPU's allocator gets it
// from the kernel anew every time: its first writes are page faults, which take several times as
// long as the writes. Huge pages take away most of them.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t size) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(size)) / kHugePage;
  if (begin < end) {
    // Advice: where the kernel does not take it, nothing is lost.
    madvise(reinterpret_cast<void*>(begin * kHugePage), (end - begin) * kHugePage, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace graddot
