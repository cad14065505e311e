// Large results and scratch memory on a CPU.
#pragma once

#include <cstdint>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace graddot {

constexpr uintptr_t kHugePage = 2 * 1024 * 1024;

// A weight gradient has the size of its table (154 MB for GPT-2), and the CPU's allocator gets it
// from the kernel anew every time: its first writes are page faults, which take several times as
// long as the writes. Huge pages take away most of them.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t size) {
#ifdef __linux__
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(size)) / kHugePage;
  if (begin < end) {
    // Advice: where the kernel does not take it, nothing is lost.
    madvise(reinterpret_cast<void*>(begin * kHugePage), (end - begin) * kHugePage, MADV_HUGEPAGE);
  }
#endif
}

// Memory that a thread keeps from call to call, from a huge page's beginning: fresh megabytes for every
// layer of every step would cost page faults each time. Huge pages, for panels are read in an order that
// misses small ones: a tenth of a matrix product's time. The kernel's own: glibc, given large blocks back
// as a thread needs larger ones, would from then on keep others' that it is given, some 5 % of a step's peak.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(); }

  // Of so many floats, with anything in them.
  float* get(int64_t size) {
    if (size > size_) {
      free();
      const auto bytes = (static_cast<uint64_t>(size) * sizeof(float) / kHugePage + 2) * kHugePage;
      memory_ = allocate(bytes);
      bytes_ = bytes;
      size_ = size;
      const auto begin = reinterpret_cast<uintptr_t>(memory_);
      floats_ = reinterpret_cast<float*>((begin + kHugePage - 1) / kHugePage * kHugePage);
      advise_huge_pages(memory_, static_cast<int64_t>(bytes));
    }
    return floats_;
  }

 private:
#ifdef __linux__
  static void* allocate(uint64_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
  }

  void free() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
    memory_ = nullptr;
    size_ = 0;
  }
#else
  static void* allocate(uint64_t bytes) { return ::operator new(bytes); }

  void free() {
    ::operator delete(memory_);
    memory_ = nullptr;
    size_ = 0;
  }
#endif

  void* memory_ = nullptr;
  float* floats_ = nullptr;
  uint64_t bytes_ = 0;
  int64_t size_ = 0;
};

}  // namespace graddot
