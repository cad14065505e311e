// CUDA kernels as plain C++: a launch runs its thread blocks one after the other, each thread of a
// block on a stack of its own. In random order, one warp after the other runs as far as it gets
// without the others, so that a missing barrier gives a wrong result. What cannot be seen here: the
// memory model within a warp, speed, and everything between the driver and the hardware.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static  // blocks never run at the same time

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_host {

inline cudaError_t cub_error = cudaSuccess;  // what cub's functions return, having done nothing else

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the host: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

enum class State { kReady, kAtBarrier, kInShuffle, kDone };

struct Thread {
  static constexpr size_t kStack = size_t{1} << 17;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  State state;
  unsigned mask, lane_mask;  // of the shuffle that it is in
  unsigned char value[8];    // sent, and then received
};

class Block {
 public:
  void run(unsigned size, const std::function<void()>& body) {
    if (size == 0 || size > 1024) {
      fail("a block has 1 to 1024 threads");
    }
    body_ = &body;
    size_ = size;
    threads_.resize(std::max<size_t>(threads_.size(), size));
    for (unsigned i = 0; i < size; ++i) {
      Thread& thread = threads_[i];
      thread.state = State::kReady;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = Thread::kStack;
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, [] { block().enter(); }, 0);
    }
    do {
      for (const unsigned warp : random_order((size + 31) / 32)) {
        run_warp(32 * warp);
      }
    } while (open_barrier());
  }

  // Lets the others run until `state` is over.
  void wait(State state) {
    Thread& thread = current();
    const unsigned index = threadIdx.x;
    thread.state = state;
    swapcontext(&thread.context, &scheduler_);
    threadIdx.x = index;
  }

  Thread& current() { return threads_[threadIdx.x]; }

  static Block& block() {
    static Block block;
    return block;
  }

 private:
  void enter() {
    (*body_)();
    current().state = State::kDone;
  }

  const std::vector<unsigned>& random_order(unsigned size) {
    std::vector<unsigned>& order = orders_[size];
    if (order.empty()) {
      order.resize(size);
      std::iota(order.begin(), order.end(), 0u);
    }
    std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  // Until each of its threads has ended or is at the barrier.
  void run_warp(unsigned begin) {
    do {
      for (const unsigned lane : random_order(std::min(32u, size_ - begin))) {
        threadIdx.x = begin + lane;
        if (current().state == State::kReady) {
          swapcontext(&scheduler_, &current().context);
        }
      }
    } while (shuffle(begin));
  }

  // Exchanges the values of a warp that has come to a shuffle.
  bool shuffle(unsigned begin) {
    Thread* lanes = &threads_[begin];
    const unsigned size = std::min(32u, size_ - begin);
    const auto in_shuffle = [](const Thread& t) { return t.state == State::kInShuffle; };
    if (std::none_of(lanes, lanes + size, in_shuffle)) {
      return false;
    }
    if (size < 32 || !std::all_of(lanes, lanes + size, in_shuffle)) {
      fail("a shuffle waits for lanes that do not come");
    }
    unsigned char sent[32][8];
    for (unsigned lane = 0; lane < 32; ++lane) {
      std::memcpy(sent[lane], lanes[lane].value, 8);
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanes[lane].mask != 0xffffffff || lanes[lane].lane_mask != lanes[0].lane_mask) {
        fail("lanes of one warp are in different shuffles");
      }
      std::memcpy(lanes[lane].value, sent[lane ^ lanes[lane].lane_mask], 8);
      lanes[lane].state = State::kReady;
    }
    return true;
  }

  // For the threads that have not ended, all of which are at it.
  bool open_barrier() {
    bool opened = false;
    for (unsigned i = 0; i < size_; ++i) {
      opened |= threads_[i].state == State::kAtBarrier;
      if (threads_[i].state == State::kAtBarrier) {
        threads_[i].state = State::kReady;
      }
    }
    return opened;
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  unsigned size_ = 0;
  std::map<unsigned, std::vector<unsigned>> orders_;
  ucontext_t scheduler_;
  std::mt19937 random_{0};
};

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::block().wait(cuda_on_host::State::kAtBarrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= 8);
  auto& block = cuda_on_host::Block::block();
  auto& thread = block.current();
  thread.mask = mask;
  thread.lane_mask = static_cast<unsigned>(lane_mask);
  std::memcpy(thread.value, &value, sizeof(T));
  block.wait(cuda_on_host::State::kInShuffle);
  std::memcpy(&value, thread.value, sizeof(T));
  return value;
}

[[noreturn]] inline void __trap() { cuda_on_host::fail("trap"); }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0) {
    cuda_on_host::fail("a grid has at least one block");
  }
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx.x = i;
    cuda_on_host::Block::block().run(blockDim.x, [&] { kernel(static_cast<P>(args)...); });
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "an error" : "no error"; }
