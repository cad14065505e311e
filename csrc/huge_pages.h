// Large results and scratch memory on a CPU.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace graddot {

constexpr int64_t kHugePage = 2 * 1024 * 1024;

// A weight gradient has the size of its table (154 MB for GPT-2), and the CPU's allocator gets it
// from the kernel anew every time: its first writes are page faults, which take several times as
// long as the writes. Huge pages take away most of them.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t size) {
#ifdef __linux__
  constexpr auto kPage = static_cast<uintptr_t>(kHugePage);
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(size)) / kPage;
  if (begin < end) {
    // Advice: where the kernel does not take it, nothing is lost.
    madvise(reinterpret_cast<void*>(begin * kPage), (end - begin) * kPage, MADV_HUGEPAGE);
  }
#endif
}

// Memory that a thread keeps from call to call, from a cache line's beginning: fresh megabytes for every
// layer of every step would cost page faults each time. Huge pages, for panels are read in an order that
// misses small ones: a tenth of a matrix product's time.
class Scratch {
 public:
  // Of so many floats, with anything in them.
  float* get(int64_t size) {
    if (size > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t bytes = (size * int64_t{sizeof(float)} + kHugePage - 1) / kHugePage * kHugePage;
      memory_.reset(std::aligned_alloc(static_cast<size_t>(kHugePage), static_cast<size_t>(bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      advise_huge_pages(memory_.get(), bytes);
      size_ = bytes / int64_t{sizeof(float)};
    }
    return static_cast<float*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace graddot
