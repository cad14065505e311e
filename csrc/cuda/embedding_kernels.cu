// Tokens are sorted by id (stable, so that equal ids stay in token order) and cut into segments of
// equal id. A team of warps then owns 128 columns of one segment: it sums the segment's gradient
// rows into the weight gradient's row and dots each row with the direction's, which it holds in
// registers. Each token's dots go to memory block by block and are summed a sample at a time.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "embedding_kernels.h"
#include "segments.cuh"

namespace graddot {
namespace {

constexpr int kLaneColumns = 4;
constexpr int kBlockColumns = 32 * kLaneColumns;
// A segment with more tokens than this is shared by all the warps of a thread block.
constexpr int kLongSegment = 32;
constexpr int kTeamWarps = kThreads / 32;

template <class T>
struct SumType {
  using type = float;
};
template <>
struct SumType<double> {
  using type = double;
};
template <class T>
using Sum = typename SumType<T>::type;

// One thread's columns of one row, `lane` and every 32nd after it: a warp reads them coalesced
// whatever the row's alignment.
template <class A>
struct Slice {
  A value[kLaneColumns] = {};

  template <class T>
  __device__ void add(const T* row, int columns, int lane) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int column = lane + 32 * i;
      value[i] += column < columns ? static_cast<A>(row[column]) : A(0);
    }
  }
};

template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffff, x, offset);
  }
  return x;
}

// The sum of the team's slices, in the order of its warps, for every warp of it.
template <int kWarps, class A>
__device__ void team_sum(Slice<A>& slice, A* shared, int warp, int lane) {
  if constexpr (kWarps > 1) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      shared[warp * kBlockColumns + lane + 32 * i] = slice.value[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      slice.value[i] = 0;
      for (int w = 0; w < kWarps; ++w) {
        slice.value[i] += shared[w * kBlockColumns + lane + 32 * i];
      }
    }
    __syncthreads();
  }
}

// What the segment kernel reads and writes, for one direction.
struct SegmentWork {
  Segments train, val;
  const int* match;  // of every train segment, its val segment or -1; null if the direction is given
  RowMatrix grad, val_grad, direction;  // direction: (1, num_embeddings, d)
  int cols, val_cols;
  int64_t width, num_embeddings;
  void* weight_grad;  // null in the passes after the first
  const double* scale;
  void* partials;  // (N·T, blocks); null if there is no direction
};

template <class T>
__device__ const T* token_row(const RowMatrix& matrix, int token, int cols) {
  return static_cast<const T*>(matrix.data) + (token / cols) * matrix.row_stride +
         (token % cols) * matrix.col_stride;
}

// One column block of one segment, by a team of kWarps warps of which this is number `warp`.
template <class T, int kWarps>
__device__ void run_segment(const SegmentWork& work, int segment, int block, int warp, int lane,
                            Sum<T>* shared) {
  const int64_t id = work.train.ids[segment], begin = int64_t(block) * kBlockColumns;
  const int columns = static_cast<int>(min(int64_t(kBlockColumns), work.width - begin));
  const int match = work.match ? work.match[segment] : -1;
  Slice<Sum<T>> direction, sum;
  if (work.direction.data) {
    const T* rows = static_cast<const T*>(work.direction.data);
    direction.add(rows + id * work.direction.col_stride + begin, columns, lane);
  } else if (match >= 0) {
    const int* tokens = work.val.tokens + work.val.begins[match];
    for (int i = warp; i < work.val.counts[match]; i += kWarps) {
      direction.add(token_row<T>(work.val_grad, tokens[i], work.val_cols) + begin, columns, lane);
    }
    team_sum<kWarps>(direction, shared, warp, lane);
  }
  const bool has_direction = work.partials && (work.direction.data || match >= 0);
  const int64_t blocks = (work.width + kBlockColumns - 1) / kBlockColumns;
  const int* tokens = work.train.tokens + work.train.begins[segment];
  for (int i = warp; i < work.train.counts[segment]; i += kWarps) {
    Slice<Sum<T>> row;
    row.add(token_row<T>(work.grad, tokens[i], work.cols) + begin, columns, lane);
    Sum<T> dot = 0;
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      sum.value[j] += row.value[j];
      dot += row.value[j] * direction.value[j];
    }
    if (has_direction) {
      dot = warp_sum(dot);
      if (lane == 0) {
        static_cast<Sum<T>*>(work.partials)[tokens[i] * blocks + block] = dot;
      }
    }
  }
  if (work.weight_grad) {
    team_sum<kWarps>(sum, shared, warp, lane);
    const Sum<T> scale = work.scale ? static_cast<Sum<T>>(*work.scale) : Sum<T>(1);
    Sum<T>* row = static_cast<Sum<T>*>(work.weight_grad) + id * work.width + begin;
    for (int i = 0; warp == 0 && i < kLaneColumns; ++i) {
      if (lane + 32 * i < columns) {
        row[lane + 32 * i] = sum.value[i] * scale;
      }
    }
  }
}

// Teams stride over all column blocks of all segments: kWarps of 1 takes the short ones, of
// kTeamWarps, a whole thread block, the long ones. The number of segments is known on the device only.
template <class T, int kWarps>
__global__ void __launch_bounds__(kThreads) segment_kernel(SegmentWork work) {
  __shared__ Sum<T> shared[kWarps > 1 ? kWarps * kBlockColumns : 1];
  constexpr int kTeams = kTeamWarps / kWarps;
  const int lane = threadIdx.x % 32, team = threadIdx.x / 32 / kWarps;
  const int warp = threadIdx.x / 32 % kWarps;
  const int64_t blocks = (work.width + kBlockColumns - 1) / kBlockColumns;
  const int64_t items = *work.train.size * blocks;
  for (int64_t item = int64_t(blockIdx.x) * kTeams + team; item < items;
       item += int64_t(gridDim.x) * kTeams) {
    const int segment = static_cast<int>(item / blocks);
    const bool padding = work.train.ids[segment] == work.num_embeddings;
    const int match = work.match ? work.match[segment] : -1;
    const int tokens = max(work.train.counts[segment], match < 0 ? 0 : work.val.counts[match]);
    const bool wanted = work.weight_grad || work.direction.data || match >= 0;
    if (wanted && !padding && (tokens > kLongSegment) == (kWarps > 1)) {
      run_segment<T, kWarps>(work, segment, static_cast<int>(item % blocks), warp, lane, shared);
    }
  }
}

// One output a thread block: `terms` consecutive partials, in double and in a fixed order.
template <class A>
__global__ void sum_kernel(const A* partials, int64_t terms, A* dots) {
  __shared__ double shared[kThreads / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < terms; i += blockDim.x) {
    sum += partials[blockIdx.x * terms + i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    shared[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
      sum += shared[warp];
    }
    dots[blockIdx.x] = static_cast<A>(sum);
  }
}

template <class T>
class Solver {
 public:
  Solver(const EmbeddingProblem& problem, void* workspace)
      : p_(problem),
        arena_(workspace),
        num_tokens_(p_.ids.rows * p_.ids.cols),
        blocks_((p_.width + kBlockColumns - 1) / kBlockColumns),
        train_(arena_, num_tokens_, p_.num_embeddings),
        val_(arena_, p_.direction_given() ? 0 : p_.val_ids.rows * p_.val_ids.cols,
             p_.num_embeddings),
        match_(arena_.take<int>(num_tokens_)),
        partials_(arena_.take<Sum<T>>(num_tokens_ * blocks_)) {}

  size_t workspace_bytes() const { return arena_.used(); }

  void run(cudaStream_t stream) const {
    if (p_.weight_grad) {
      cudaMemsetAsync(p_.weight_grad, 0, p_.num_embeddings * p_.width * sizeof(Sum<T>), stream);
    }
    if (p_.dots && num_tokens_ * blocks_ == 0) {
      const int64_t count = p_.num_directions * (p_.per_token ? num_tokens_ : p_.ids.rows);
      cudaMemsetAsync(p_.dots, 0, count * sizeof(Sum<T>), stream);
    }
    if (num_tokens_ * blocks_ == 0) {
      return;
    }
    const Segments train = train_.sort(p_.ids, p_.padding_idx, stream);
    int64_t val_row = 0;
    for (int64_t k = 0; k < std::max<int64_t>(p_.num_directions, 1); ++k) {
      SegmentWork work{};
      work.train = train;
      work.grad = p_.grad;
      work.cols = static_cast<int>(p_.ids.cols);
      work.width = p_.width;
      work.num_embeddings = p_.num_embeddings;
      work.weight_grad = k == 0 ? p_.weight_grad : nullptr;
      work.scale = p_.scale;
      if (k < p_.num_directions) {
        work.partials = partials_;
        cudaMemsetAsync(partials_, 0, num_tokens_ * blocks_ * sizeof(Sum<T>), stream);
        val_row = set_direction(work, k, val_row, stream);
      }
      launch(work, stream);
      if (k < p_.num_directions) {
        sum_partials(k, stream);
      }
    }
  }

 private:
  // Direction k; the val rows of the next begin at the result.
  int64_t set_direction(SegmentWork& work, int64_t k, int64_t val_row, cudaStream_t stream) const {
    if (p_.direction_given()) {
      const T* rows = static_cast<const T*>(p_.direction.data) + k * p_.direction.row_stride;
      work.direction = {rows, 0, p_.direction.col_stride};
      return val_row;
    }
    const int64_t rows = p_.val_rows[static_cast<size_t>(k)];
    if (rows * p_.val_ids.cols > 0) {
      IdMatrix ids = p_.val_ids;
      const size_t id_size = ids.is_int64 ? sizeof(int64_t) : sizeof(int32_t);
      ids.data = static_cast<const char*>(ids.data) + val_row * ids.row_stride * int64_t(id_size);
      ids.rows = rows;
      const T* grad = static_cast<const T*>(p_.val_grad.data) + val_row * p_.val_grad.row_stride;
      work.val_grad = {grad, p_.val_grad.row_stride, p_.val_grad.col_stride};
      work.val_cols = static_cast<int>(ids.cols);
      work.val = val_.sort(ids, p_.padding_idx, stream);
      match_segments(work.train, work.val, num_tokens_, match_, stream);
      work.match = match_;
    }
    return val_row + rows;
  }

  // Enough thread blocks for every team to have one item, were all segments of the kernel's kind as
  // short as they can be, and at most what fills the largest GPUs several times: teams stride.
  void launch(const SegmentWork& work, cudaStream_t stream) const {
    const int64_t short_items = num_tokens_ * blocks_;
    const int64_t long_items =
        (num_tokens_ + p_.val_ids.rows * p_.val_ids.cols) / (kLongSegment + 1) * blocks_;
    const auto grid = [](int64_t thread_blocks) {
      return std::clamp<int64_t>(thread_blocks, 1, 4096);
    };
    launch_kernel(stream, grid((short_items + kTeamWarps - 1) / kTeamWarps), kThreads,
                  segment_kernel<T, 1>, work);
    launch_kernel(stream, grid(long_items), kThreads, segment_kernel<T, kTeamWarps>, work);
  }

  void sum_partials(int64_t k, cudaStream_t stream) const {
    const int64_t terms = (p_.per_token ? 1 : p_.ids.cols) * blocks_;
    const int64_t count = p_.per_token ? num_tokens_ : p_.ids.rows;
    const int threads = terms <= 32 ? 32 : kThreads;
    launch_kernel(stream, count, threads, sum_kernel<Sum<T>>, partials_, terms,
                  static_cast<Sum<T>*>(p_.dots) + k * count);
  }

  const EmbeddingProblem& p_;
  Arena arena_;
  int64_t num_tokens_, blocks_;
  TokenSorter train_, val_;
  int* match_;
  Sum<T>* partials_;
};

template <class F>
auto dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat64: return f(double{});
    case Dtype::kBFloat16: return f(__nv_bfloat16{});
    case Dtype::kFloat16: return f(__half{});
    default: return f(float{});
  }
}

}  // namespace

size_t embedding_workspace_bytes(const EmbeddingProblem& problem) {
  return dispatch(problem.dtype, [&](auto element) {
    return Solver<decltype(element)>(problem, nullptr).workspace_bytes();
  });
}

const char* embedding_dots_cuda(const EmbeddingProblem& problem, void* workspace, void* stream) {
  dispatch(problem.dtype, [&](auto element) {
    Solver<decltype(element)>(problem, workspace).run(static_cast<cudaStream_t>(stream));
    return 0;
  });
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace graddot
