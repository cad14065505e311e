#include "embedding.h"

#include <algorithm>

#include "parallel.h"
#include "rows.h"

namespace graddot {
namespace {

// Elements under which a second thread costs more than it saves.
constexpr int64_t kGrain = 32 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<int64_t> row_targets(const std::vector<int64_t>& val_rows) {
  std::vector<int64_t> targets;
  for (size_t k = 0; k < val_rows.size(); ++k) {
    targets.insert(targets.end(), static_cast<size_t>(val_rows[k]), static_cast<int64_t>(k));
  }
  return targets;
}

template <class T>
struct Work {
  const EmbeddingProblem& p;
  const std::vector<Token> tokens, val_tokens;
  const std::vector<int64_t> val_target;  // of every val row, its direction
  const std::vector<Segment> segments;
  const int64_t blocks;          // column blocks of a row
  const int64_t num_tokens;      // N·T
  std::vector<Sum<T>> partials;  // (K, N·T, blocks): dots of every token, block by block

  explicit Work(const EmbeddingProblem& problem)
      : p(problem),
        tokens(sorted_tokens(p.ids, p.padding_idx)),
        val_tokens(p.direction_given() ? std::vector<Token>() : sorted_tokens(p.val_ids, p.padding_idx)),
        val_target(row_targets(p.val_rows)),
        segments(make_segments(tokens, val_tokens, !p.direction_given() && !p.weight_grad)),
        blocks(ceil_div(p.width, kBlock)),
        num_tokens(p.ids.rows * p.ids.cols),
        partials(static_cast<size_t>(p.num_directions * num_tokens * blocks)) {}

  Sum<T>* weight_row(int64_t id) const {
    return static_cast<Sum<T>*>(p.weight_grad) + id * p.width;
  }

  static const T* row(const RowMatrix& matrix, int64_t row, int64_t col) {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + col * matrix.col_stride;
  }

  static const T* token_row(const RowMatrix& grad, const IdMatrix& ids, const Token& token) {
    return row(grad, token.index / ids.cols, token.index % ids.cols);
  }

  void zero_untouched_rows() const;
  void run_segments();
  void run_segment(const Segment& segment, int64_t block_begin, int64_t block_end,
                   Sum<T>* val_rows);
  void sum_val_rows(const Segment& segment, int64_t begin, int64_t size, Sum<T>* val_rows) const;
  template <class D>
  void add_and_dot(const Segment& segment, const D* directions, int64_t num_directions,
                   int64_t direction_stride, int64_t block_begin, int64_t size);
  void sum_partials() const;
};

// Every row of weight_grad is written once: here if it has no token, else by run_segment.
template <class T>
void Work<T>::zero_untouched_rows() const {
  parallel_for(p.num_embeddings, ceil_div(kGrain, p.width), [&](int64_t begin, int64_t end) {
    auto segment = std::lower_bound(segments.begin(), segments.end(), begin,
                                    [](const Segment& s, int64_t id) { return s.id < id; });
    while (begin < end) {
      const int64_t next = segment == segments.end() ? end : std::min(segment->id, end);
      std::fill(weight_row(begin), weight_row(next), Sum<T>(0));
      begin = next + 1;
      if (segment != segments.end()) {
        ++segment;
      }
    }
  });
}

// Threads share the work by tokens x column blocks. Laid out segment by segment and, within one,
// block by block, an equal cut gives a thread whole segments and, at its ends, some column blocks
// of one: even a batch that is a single id is shared, and no sum is ever cut along tokens.
template <class T>
void Work<T>::run_segments() {
  const int64_t cost = segments.empty() ? 0 : segments.back().cost_begin + segments.back().cost();
  parallel_for(cost * blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> val_rows(static_cast<size_t>(p.num_directions * p.width));
    auto segment = std::upper_bound(
        segments.begin(), segments.end(), begin,
        [&](int64_t position, const Segment& s) { return position < s.cost_begin * blocks; });
    for (--segment; segment != segments.end() && segment->cost_begin * blocks < end; ++segment) {
      // Block c lies at start + c * cost and belongs to the range that holds that position.
      const int64_t start = segment->cost_begin * blocks;
      const int64_t first = ceil_div(std::max<int64_t>(begin - start, 0), segment->cost());
      const int64_t last = std::min(ceil_div(end - start, segment->cost()), blocks);
      if (first < last) {
        run_segment(*segment, first, last, val_rows.data());
      }
    }
  });
}

template <class T>
void Work<T>::run_segment(const Segment& segment, int64_t block_begin, int64_t block_end,
                          Sum<T>* val_rows) {
  const int64_t begin = block_begin * kBlock;
  const int64_t size = std::min(block_end * kBlock, p.width) - begin;
  if (p.direction_given()) {
    const T* directions = row(p.direction, 0, segment.id) + begin;
    add_and_dot(segment, directions, p.num_directions, p.direction.row_stride, block_begin, size);
  } else if (segment.val_begin < segment.val_end) {
    sum_val_rows(segment, begin, size, val_rows);
    add_and_dot(segment, val_rows, p.num_directions, size, block_begin, size);
  } else {
    add_and_dot(segment, val_rows, 0, size, block_begin, size);
  }
  if (p.weight_grad && p.scale) {
    scale_row(weight_row(segment.id) + begin, static_cast<Sum<T>>(*p.scale), size);
  }
}

// The directions' row of the segment's id, columns [begin, begin + size), (K, size).
template <class T>
void Work<T>::sum_val_rows(const Segment& segment, int64_t begin, int64_t size,
                           Sum<T>* val_rows) const {
  std::fill(val_rows, val_rows + p.num_directions * size, Sum<T>(0));
  for (int64_t i = segment.val_begin; i < segment.val_end; ++i) {
    const int64_t k = val_target[static_cast<size_t>(val_tokens[i].index / p.val_ids.cols)];
    add_row(val_rows + k * size, token_row(p.val_grad, p.val_ids, val_tokens[i]) + begin, size);
  }
}

// One pass over the segment's gradient rows: each is added and dotted while it is in cache.
template <class T>
template <class D>
void Work<T>::add_and_dot(const Segment& segment, const D* directions, int64_t num_directions,
                          int64_t direction_stride, int64_t block_begin, int64_t size) {
  for (int64_t i = segment.begin; i < segment.end; ++i) {
    const T* grad = token_row(p.grad, p.ids, tokens[i]) + block_begin * kBlock;
    if (p.weight_grad) {
      Sum<T>* sum = weight_row(segment.id) + block_begin * kBlock;
      i == segment.begin ? store_row(sum, grad, size) : add_row(sum, grad, size);
    }
    for (int64_t k = 0; k < num_directions; ++k) {
      Sum<T>* dots = &partials[(k * num_tokens + tokens[i].index) * blocks + block_begin];
      dot_blocks(directions + k * direction_stride, grad, size, dots);
    }
  }
}

// Sums over blocks and tokens, in their order, in double: they are few and may cancel.
template <class T>
void Work<T>::sum_partials() const {
  const int64_t terms = (p.per_token ? 1 : p.ids.cols) * blocks;
  const int64_t count = p.num_directions * (p.per_token ? num_tokens : p.ids.rows);
  auto* dots = static_cast<Sum<T>*>(p.dots);
  parallel_for(count, ceil_div(kGrain, std::max<int64_t>(terms, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   double sum = 0;
                   for (int64_t j = i * terms; j < (i + 1) * terms; ++j) {
                     sum += partials[j];
                   }
                   dots[i] = static_cast<Sum<T>>(sum);
                 }
               });
}

template <class T>
void run(const EmbeddingProblem& problem) {
  Work<T> work(problem);
  if (problem.weight_grad && problem.width > 0) {
    work.zero_untouched_rows();
  }
  work.run_segments();
  work.sum_partials();
}

}  // namespace

void embedding_dots(const EmbeddingProblem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32: return run<float>(problem);
    case Dtype::kFloat64: return run<double>(problem);
    case Dtype::kBFloat16: return run<BFloat16>(problem);
    case Dtype::kFloat16: return run<Half>(problem);
  }
}

}  // namespace graddot
