// The embedding code without Python or torch, the CPU's or, linked with cuda_on_host/embedding.cpp,
// the CUDA kernels: results against plain loops in double, for any number of
// threads, on buffers of exactly the size that the views span, so that a sanitizer sees every
// access outside them. csrc/check.sh builds and runs it.

#include "embedding.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "rows.h"
#include "threads.h"
#if __has_include("cuda_on_host.h")
#include "cuda_on_host.h"
#endif

namespace graddot {

namespace {

std::vector<double> random_numbers(int64_t size) {
  std::vector<double> numbers(static_cast<size_t>(size));
  for (double& x : numbers) {
    x = std::normal_distribution<double>()(generator);
  }
  return numbers;
}

// A problem in fp64: n training samples and then v val samples in the same matrices.
struct Case {
  int64_t n, v, t, d, e, padding;
  bool broadcast_ids, given;
  std::vector<int32_t> ids;
  std::vector<double> grad, direction, weight_grad, dots;
  std::vector<int64_t> val_rows;

  int64_t id(int64_t row, int64_t col) const {
    return ids[static_cast<size_t>((broadcast_ids ? 0 : row * t) + col)];
  }

  EmbeddingProblem problem() {
    EmbeddingProblem p{};
    const int64_t id_stride = broadcast_ids ? 0 : t;
    p.dtype = Dtype::kFloat64;
    p.width = d;
    p.num_embeddings = e;
    p.padding_idx = padding;
    p.ids = {ids.data(), false, n, t, id_stride, 1};
    p.grad = {grad.data(), t * d, d};
    p.num_directions = static_cast<int64_t>(val_rows.size());
    if (given) {
      p.direction = {direction.data(), e * d, d};
    } else {
      p.val_ids = {ids.data() + n * id_stride, false, v, t, id_stride, 1};
      p.val_grad = {grad.data() + n * t * d, t * d, d};
      p.val_rows = val_rows;
    }
    weight_grad.assign(static_cast<size_t>(e * d), std::nan(""));
    dots.assign(val_rows.size() * static_cast<size_t>(n), std::nan(""));
    p.weight_grad = weight_grad.data();
    p.dots = dots.data();
    return p;
  }
};

Case random_case() {
  Case c{};
  c.n = random_int(4);
  c.t = random_int(4) ? random_int(5) : random_int(80);  // segments are long from 33 tokens on
  c.d = random_int(2) ? random_int(5) : 120 + random_int(300);
  c.e = 1 + random_int(random_int(2) ? 5 : 500);
  c.padding = random_int(c.e + 1) - 1;
  c.broadcast_ids = random_int(4) == 0;
  c.given = random_int(2) == 0;
  c.val_rows = {1 + random_int(2), random_int(3)};
  c.v = c.val_rows[0] + c.val_rows[1];
  for (int64_t i = 0; i < (c.broadcast_ids ? 1 : c.n + c.v) * c.t; ++i) {
    c.ids.push_back(static_cast<int32_t>(random_int(c.e)));
  }
  c.grad = random_numbers((c.n + c.v) * c.t * c.d);
  if (c.given) {
    c.direction = random_numbers(2 * c.e * c.d);
  }
  return c;
}

// table[id] += grad over the tokens of rows [begin, end).
void scatter(const Case& c, int64_t begin, int64_t end, double* table) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t col = 0; col < c.t; ++col) {
      for (int64_t i = 0; c.id(row, col) != c.padding && i < c.d; ++i) {
        table[c.id(row, col) * c.d + i] += c.grad[static_cast<size_t>((row * c.t + col) * c.d + i)];
      }
    }
  }
}

void expect_close(const std::vector<double>& got, const std::vector<double>& want,
                  const std::string& name) {
  for (size_t i = 0; i < want.size(); ++i) {
    const bool close = std::abs(got[i] - want[i]) <= 1e-11 * (1 + std::abs(want[i]));
    expect(close, name + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", expected " +
                      std::to_string(want[i]));
  }
}

void test_against_plain_loops(Case& c) {
  num_threads = 1 + random_int(4);
  embedding_dots(c.problem());
  const auto size = static_cast<size_t>(c.e * c.d);
  std::vector<double> weight_grad(size);
  scatter(c, 0, c.n, weight_grad.data());
  expect_close(c.weight_grad, weight_grad, "weight_grad");
  std::vector<double> directions = c.direction, dots;
  if (!c.given) {
    directions.assign(2 * size, 0);
    scatter(c, c.n, c.n + c.val_rows[0], directions.data());
    scatter(c, c.n + c.val_rows[0], c.n + c.v, directions.data() + size);
  }
  for (size_t k = 0; k < 2; ++k) {
    for (int64_t row = 0; row < c.n; ++row) {
      std::vector<double> sample(size);
      scatter(c, row, row + 1, sample.data());
      double dot = 0;
      for (size_t i = 0; i < size; ++i) {
        dot += sample[i] * directions[k * size + i];
      }
      dots.push_back(dot);
    }
  }
  expect_close(c.dots, dots, "dots");
}

void test_any_number_of_threads(Case& c) {
  num_threads = 1;
  embedding_dots(c.problem());
  const std::vector<double> weight_grad = c.weight_grad, dots = c.dots;
  for (num_threads = 2; num_threads < 9; ++num_threads) {
    embedding_dots(c.problem());
    expect(c.weight_grad == weight_grad, "weight_grad is the same for any number of threads");
    expect(c.dots == dots, "dots are the same for any number of threads");
  }
}

void test_check_ids() {
  const std::vector<int64_t> ids{0, 3, int64_t{1} << 60, 1};
  const IdMatrix columns{ids.data(), true, 2, 2, 1, 2};  // the transpose
  try {
    check_ids(columns, 4, "ids");
  } catch (const std::out_of_range& e) {
    expect(std::string(e.what()) ==
               "ids[0, 1] is 1152921504606846976, outside the table of 4 embeddings",
           e.what());
    check_ids(columns, (int64_t{1} << 60) + 1, "ids");
    return;
  }
  expect(false, "check_ids throws");
}

#if __has_include("cuda_on_host.h")  // the CUDA kernels, which check no ids on the host but these
void test_no_embeddings() {
  for (const bool given : {false, true}) {
    Case c{};
    c.n = c.t = c.d = c.v = 1;
    c.given = given;
    c.ids = {0, 0};
    c.grad = {1, 1};
    c.val_rows = {1};
    try {
      embedding_dots(c.problem());
    } catch (const std::out_of_range&) {
      continue;
    }
    expect(false, "ids outside a table of 0 embeddings are refused");
  }
}

void test_error_of_cub() {
  Case c{};
  c.n = c.t = c.d = c.v = 1;
  c.ids = {0, 0};
  c.grad = {1, 1};
  c.val_rows = {1};
  c.e = 1;
  cuda_on_host::cub_error = 1;
  bool thrown = false;
  try {
    embedding_dots(c.problem());
  } catch (const std::runtime_error& e) {
    thrown = std::string(e.what()).find("cub: an error") != std::string::npos;
  }
  cuda_on_host::cub_error = cudaSuccess;
  expect(thrown, "an error that cub returns is raised");
}
#else
void test_no_embeddings() {}
void test_error_of_cub() {}
#endif

void test_half() {
  const auto value = [](int bits) { return to_sum(Half{static_cast<uint16_t>(bits)}); };
  expect(value(0x3c00) == 1.0f && value(0xc000) == -2.0f, "half normal");
  expect(value(0x0001) == std::ldexp(1.0f, -24), "half subnormal");
  expect(value(0x7bff) == 65504.0f, "half largest");
  expect(value(0xfc00) == -std::numeric_limits<float>::infinity(), "half infinity");
  expect(std::isnan(value(0x7e00)), "half nan");
  expect(std::signbit(value(0x8000)), "half minus zero");
}

}  // namespace
}  // namespace graddot

int main() {
  graddot::test_check_ids();
  graddot::test_no_embeddings();
  graddot::test_error_of_cub();
  graddot::test_half();
  for (int i = 0; i < 300; ++i) {
    graddot::Case c = graddot::random_case();
    graddot::test_against_plain_loops(c);
    if (i % 10 == 0) {
      graddot::test_any_number_of_threads(c);
    }
  }
  std::puts("embedding: 300 random problems, ids, half: ok");
  return 0;
}
