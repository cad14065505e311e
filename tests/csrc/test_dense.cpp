// The vector kernels without Python or torch: results against plain loops in double, on buffers of
// exactly the size that the views span, so that a sanitizer sees every access outside them.

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "threads.h"

extern const graddot::InstructionSet kSixteenLanes;

namespace graddot {
namespace {

std::vector<float> random_numbers(int64_t size) {
  std::vector<float> numbers(static_cast<size_t>(size));
  for (float& x : numbers) {
    x = std::normal_distribution<float>()(generator);
  }
  return numbers;
}

constexpr Element kAll[] = {Element::kFp32, Element::kBf16, Element::kFp16};

// Some numbers as they lie in memory, and one of them. 16 bits keep what kFormats says of a mantissa;
// given are numbers that they have, read also smaller ones.
struct Format {
  int mantissa, least;  // bits; the exponent of the least normal number
  double eps() const { return std::ldexp(1.0, -mantissa); }
};
constexpr Format kFormats[] = {{23, -126}, {7, -126}, {10, -14}};

Format format_of(Element element) { return kFormats[static_cast<int64_t>(element)]; }

std::vector<float> rounded(std::vector<float> numbers, Element element) {
  for (float& x : numbers) {
    int exponent = 0;
    const double part = std::frexp(x, &exponent);  // in [0.5, 1)
    const int bits = format_of(element).mantissa + 1;
    x = static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(part, bits)), exponent - bits));
    if (std::abs(x) < std::ldexp(1.0, format_of(element).least)) x = 0;
  }
  return numbers;
}

std::vector<unsigned char> encoded(const std::vector<float>& numbers, Element element) {
  const auto size = static_cast<size_t>(size_of(element));
  std::vector<unsigned char> bytes(numbers.size() * size);
  for (size_t i = 0; i < numbers.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, &numbers[i], sizeof(bits));
    if (element == Element::kBf16) {
      bits >>= 16;
    } else if (element == Element::kFp16) {
      const uint32_t sign = bits >> 31 << 15, rest = bits & 0x7fffffffU;
      bits = sign | (rest == 0 ? 0 : (rest >> 13) - (112U << 10));
    }
    std::memcpy(bytes.data() + i * size, &bits, size);
  }
  return bytes;
}

double decoded(const std::vector<unsigned char>& bytes, size_t i, Element element) {
  const auto size = static_cast<size_t>(size_of(element));
  uint32_t bits = 0;
  std::memcpy(&bits, bytes.data() + i * size, size);
  if (element == Element::kFp16) {
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const double part = (bits & 1023) + (exponent == 0 ? 0 : 1024);
    const double x = std::ldexp(part, (exponent == 0 ? 1 : exponent) - 25);
    return (bits >> 15) != 0 ? -x : x;
  }
  if (element == Element::kBf16) bits <<= 16;
  float x = 0;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

void expect_close(double got, double want, double size, const std::string& name) {
  expect(std::abs(got - want) <= 2e-6 * (1 + size),
         name + " is " + std::to_string(got) + ", expected " + std::to_string(want));
}

struct Case {
  int64_t n, t, d_in, d_out;
  std::vector<int64_t> val_rows;
  std::vector<float> act, grad, direction, weight_grad, dots;

  double gradient(int64_t row, int64_t o, int64_t i) const {
    double sum = 0;
    for (int64_t token = 0; token < t; ++token) {
      sum += double{grad[static_cast<size_t>((row * t + token) * d_out + o)]} *
             double{act[static_cast<size_t>((row * t + token) * d_in + i)]};
    }
    return sum;
  }

  double direction_at(size_t k, int64_t o, int64_t i) const {
    if (!direction.empty()) {
      return direction[k * static_cast<size_t>(d_out * d_in) + static_cast<size_t>(o * d_in + i)];
    }
    double sum = 0;
    int64_t row = n;
    for (size_t j = 0; j < k; ++j) row += val_rows[j];
    for (int64_t v = 0; v < val_rows[k]; ++v) sum += gradient(row + v, o, i);
    return sum;
  }
};

Case random_case(Element element) {
  const auto width = [] { return random_int(2) ? 1 + random_int(20) : 1 + random_int(150); };
  // Many outputs make several tiles, which share packed activations.
  const int64_t d_out = random_int(3) ? width() : 192 + random_int(200);
  // Many tokens go by parts.
  const int64_t tokens = random_int(8) ? random_int(9) : 250 + random_int(300);
  Case c{random_int(4), tokens, width(), d_out, {1 + random_int(2), 1}, {}, {}, {}, {}, {}};
  const int64_t rows = c.n + c.val_rows[0] + c.val_rows[1];
  c.act = rounded(random_numbers(rows * c.t * c.d_in), element);
  c.grad = rounded(random_numbers(rows * c.t * c.d_out), element);
  if (random_int(2)) {
    c.direction = random_numbers(2 * c.d_out * c.d_in);
  }
  return c;
}

void test_linear(const InstructionSet& set, Element element) {
  Case c = random_case(element);
  const auto act = encoded(c.act, element), grad = encoded(c.grad, element);
  const auto k = static_cast<int64_t>(c.val_rows.size());
  const bool accumulate = random_int(2) != 0, norms = random_int(2) != 0;
  const int64_t columns = c.n + (norms && c.direction.empty());
  c.weight_grad.assign(static_cast<size_t>(c.d_out * c.d_in), accumulate ? 1.0F : std::nanf(""));
  c.dots.assign(static_cast<size_t>((k + norms) * columns), std::nanf(""));
  num_threads = 1 + random_int(4);
  const LinearProblem problem{
      element, c.n, c.t, c.d_in, c.d_out,
      {act.data(), c.t * c.d_in, c.d_in, 1}, {grad.data(), c.t * c.d_out, c.d_out, 1},
      k, c.direction.empty() ? nullptr : c.direction.data(), c.val_rows.data(),
      c.weight_grad.data(), c.d_in, 0.5F, accumulate, norms, c.dots.data()};
  linear_wgrad_dot(set.linear_of(problem), problem, num_threads);
  std::vector<double> dots(c.dots.size()), sizes(c.dots.size());
  for (int64_t o = 0; o < c.d_out; ++o) {
    for (int64_t i = 0; i < c.d_in; ++i) {
      double sum = accumulate ? 1 : 0;
      std::vector<double> directions;
      for (size_t j = 0; j < c.val_rows.size(); ++j) directions.push_back(c.direction_at(j, o, i));
      for (int64_t row = 0; row < c.n; ++row) {
        const double g = c.gradient(row, o, i);
        sum += 0.5 * g;
        for (size_t j = 0; j < c.val_rows.size(); ++j) {
          const auto at = j * static_cast<size_t>(columns) + static_cast<size_t>(row);
          dots[at] += g * directions[j];
          sizes[at] += std::abs(g * directions[j]);
        }
        if (norms) {
          dots[static_cast<size_t>(k * columns + row)] += g * g;
          sizes[static_cast<size_t>(k * columns + row)] += g * g;
        }
      }
      for (size_t j = 0; columns > c.n && j < c.val_rows.size(); ++j) {
        const double d = directions[j];
        dots[j * static_cast<size_t>(columns) + static_cast<size_t>(c.n)] += d * d;
        sizes[j * static_cast<size_t>(columns) + static_cast<size_t>(c.n)] += d * d;
      }
      expect_close(c.weight_grad[static_cast<size_t>(o * c.d_in + i)], sum,
                   c.t > 20 ? static_cast<double>(c.t) : 20, "weight_grad");
    }
  }
  for (size_t i = 0; i < dots.size(); ++i) {
    expect_close(c.dots[i], dots[i], sizes[i], "dots");
  }
}

// A matrix product by a kernel that takes either side along its rows or its columns.
void test_product(const InstructionSet& set) {
  const int64_t terms = random_int(4) ? 1 + random_int(100) : 900 + random_int(1400);
  const int64_t rows = 1 + random_int(90), cols = 1 + random_int(90), stride = cols + random_int(9);
  const std::vector<float> x = random_numbers(rows * terms), y = random_numbers(terms * cols);
  const bool x_along = random_int(2) != 0, y_along = random_int(2) != 0, accumulate = random_int(2) != 0;
  std::vector<float> out(static_cast<size_t>(rows * stride), 3.0F);
  num_threads = 1 + random_int(4);
  const LinearProblem problem{
      Element::kFp32, 1, terms, cols, rows,
      {y.data(), 0, y_along ? 1 : cols, y_along ? terms : 1},
      {x.data(), 0, x_along ? 1 : rows, x_along ? terms : 1},
      0, nullptr, nullptr, out.data(), stride, 1.0F, accumulate, false, nullptr};
  linear_wgrad_dot(set.linear_of(problem), problem, num_threads);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < stride; ++j) {
      double sum = accumulate || j >= cols ? 3 : 0, size = 3;
      for (int64_t t = 0; t < terms && j < cols; ++t) {
        const double product = double{x[static_cast<size_t>(x_along ? i * terms + t : t * rows + i)]} *
                               double{y[static_cast<size_t>(y_along ? j * terms + t : t * cols + j)]};
        sum += product;
        size += std::abs(product);
      }
      expect_close(out[static_cast<size_t>(i * stride + j)], sum, 0.3 * size, "product");
    }
  }
}

void test_cross_entropy(const InstructionSet& set, Element element) {
  const int64_t vocab = 1 + random_int(700), rows = random_int(4);
  const bool extras = random_int(2) != 0;
  const CrossEntropy form{element, vocab, extras ? 0.1F : 0, extras ? 0.01F : 0};
  const int64_t stride = vocab + random_int(2) * random_int(20);
  const std::vector<float> x = rounded(random_numbers(rows * stride), element);
  std::vector<unsigned char> logits = encoded(x, element);
  std::vector<float> losses(static_cast<size_t>(rows));
  std::vector<int64_t> labels;
  for (int64_t r = 0; r < rows; ++r) labels.push_back(random_int(4) ? random_int(vocab) : -1);
  num_threads = 1 + random_int(3);
  cross_entropy_grad(set.cross_entropy_row_of(element), form, rows, labels.data(), -1, logits.data(),
                     stride, losses.data());
  for (int64_t r = 0; r < rows; ++r) {
    const float* given = x.data() + r * stride;
    double sum = 0, mean = 0;
    for (int64_t j = 0; j < vocab; ++j) {
      sum += std::exp(double{given[j]});
      mean += double{given[j]} / static_cast<double>(vocab);
    }
    const int64_t label = labels[static_cast<size_t>(r)];
    const double smoothing = form.label_smoothing, z_loss = form.z_loss, lse = std::log(sum);
    const bool used = label >= 0;
    const double loss =
        used ? lse - (1 - smoothing) * given[label] - smoothing * mean + z_loss * lse * lse : 0;
    expect_close(losses[static_cast<size_t>(r)], loss, 10, "loss");
    for (int64_t j = 0; j < stride; ++j) {
      const auto at = static_cast<size_t>(r * stride + j);
      const double got = decoded(logits, at, element);
      if (j >= vocab) {
        expect_close(got, x[at], 0, "between the rows");
        continue;
      }
      const double p = std::exp(given[j] - lse) * (1 + 2 * z_loss * lse);
      const double want =
          used ? p - smoothing / static_cast<double>(vocab) - (j == label ? 1 - smoothing : 0) : 0;
      const double rounding = element == Element::kFp32 ? 0 : format_of(element).eps() / 2 * std::abs(want);
      expect(std::abs(got - want) <= 2e-6 + rounding,
             "gradient is " + std::to_string(got) + ", expected " + std::to_string(want));
    }
  }
}

void test_norm(NormPart run) {
  // Many tokens go by parts.
  const int64_t n = random_int(4), t = random_int(3) ? random_int(9) : 100 + random_int(200);
  const int64_t d = random_int(2) ? 1 + random_int(20) : 1 + random_int(150);
  const bool centered = random_int(2) != 0, wanted = random_int(3) != 0;
  const bool given = centered || random_int(2) != 0;  // rstd
  const float offset = static_cast<float>(random_int(2)), eps = random_int(2) ? 0.01F : -1;
  const std::vector<float> x = random_numbers(n * t * d), grad = random_numbers(n * t * d);
  const std::vector<float> weight = random_numbers(d), mean = random_numbers(n * t);
  const std::vector<float> rstd = random_numbers(n * t);
  std::vector<float> x_grad(static_cast<size_t>(wanted ? n * t * d : 0), std::nanf(""));
  NormProblem p{n, t, d, x.data(), grad.data(), wanted ? weight.data() : nullptr, offset,
                centered ? mean.data() : nullptr, given ? rstd.data() : nullptr, eps,
                wanted ? x_grad.data() : nullptr, nullptr, nullptr};
  std::vector<float> weights(static_cast<size_t>(n * p.parts() * d), std::nanf("")), biases = weights;
  p.weight_rows = weights.data();
  p.bias_rows = biases.data();
  num_threads = 1 + random_int(4);
  norm_backward(run, p);
  std::vector<double> weight_sums(weights.size()), bias_sums(weights.size());
  for (int64_t token = 0; token < n * t; ++token) {
    const auto at = [&](int64_t i) { return static_cast<size_t>(token * d + i); };
    const int64_t part = token / t * p.parts() + token % t / kTokensOfAPart;
    const double m = centered ? mean[static_cast<size_t>(token)] : 0;
    double squares = 0, sum = 0, product = 0;
    for (int64_t i = 0; i < d; ++i) squares += double{x[at(i)]} * x[at(i)] / static_cast<double>(d);
    const double r = given ? rstd[static_cast<size_t>(token)] : eps < 0 ? 1 : 1 / std::sqrt(squares + eps);
    const auto normed = [&](int64_t i) { return (x[at(i)] - m) * r; };
    const auto scaled = [&](int64_t i) { return grad[at(i)] * (double{offset} + weight[static_cast<size_t>(i)]); };
    for (int64_t i = 0; i < d; ++i) {
      weight_sums[static_cast<size_t>(part * d + i)] += grad[at(i)] * normed(i);
      bias_sums[static_cast<size_t>(part * d + i)] += grad[at(i)];
      sum += scaled(i) / static_cast<double>(d);
      product += scaled(i) * normed(i) / static_cast<double>(d);
    }
    for (int64_t i = 0; wanted && i < d; ++i) {
      const double want = r * (scaled(i) - normed(i) * product - (centered ? sum : 0));
      const double size = std::abs(r) * (std::abs(scaled(i)) + std::abs(normed(i) * product));
      expect_close(x_grad[at(i)], want, 5 * size, "norm's x_grad");
    }
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    expect_close(weights[i], weight_sums[i], 1000, "norm's weight_rows");
    expect_close(biases[i], bias_sums[i], 100, "norm's bias_rows");
  }
}

void test_column_sums(const InstructionSet& set, Element element) {
  const int64_t n = random_int(4), t = random_int(3) ? random_int(20) : 100 + random_int(200);
  const int64_t d = random_int(2) ? 1 + random_int(20) : 1 + random_int(150);
  const int64_t between = random_int(3), token_stride = d + between;
  const int64_t row_stride = t * token_stride + random_int(5);
  const int64_t size = n * t == 0 ? 0 : (n - 1) * row_stride + (t - 1) * token_stride + d;
  const std::vector<float> numbers = rounded(random_numbers(size), element);
  const std::vector<unsigned char> x = encoded(numbers, element);
  ColumnSums p{element, n, t, d, x.data(), row_stride, token_stride, nullptr};
  std::vector<float> sums(static_cast<size_t>(n * p.parts() * d), std::nanf(""));
  p.sums = sums.data();
  num_threads = 1 + random_int(4);
  column_sums(set.column_sums_part_of(element), p);
  std::vector<double> want(sums.size()), sizes(sums.size());
  for (int64_t token = 0; token < n * t; ++token) {
    const int64_t part = token / t * p.parts() + token % t / kTokensOfAPart;
    for (int64_t i = 0; i < d; ++i) {
      const auto at = static_cast<size_t>(token / t * row_stride + token % t * token_stride + i);
      want[static_cast<size_t>(part * d + i)] += numbers[at];
      sizes[static_cast<size_t>(part * d + i)] += std::abs(numbers[at]);
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    expect_close(sums[i], want[i], sizes[i], "sum of a column");
  }
}

}  // namespace
}  // namespace graddot

int main() {
  std::vector<const graddot::InstructionSet*> sets;
#ifdef __x86_64__
  using graddot::kAmx, graddot::kAvx2, graddot::kAvx512;
  const graddot::InstructionSet* best = graddot::instruction_set();
  if (best != nullptr) sets = {&kAvx2, &kSixteenLanes};
  if (best == &kAvx512 || best == &kAmx) sets.push_back(&kAvx512);
  if (best == &kAmx) sets.push_back(&kAmx);
#endif
  for (const graddot::InstructionSet* set : sets) {
    for (int i = 0; i < 150; ++i) {
      for (const graddot::Element element : graddot::kAll) {
        graddot::test_linear(*set, element);
        graddot::test_cross_entropy(*set, element);
        graddot::test_column_sums(*set, element);
      }
      graddot::test_norm(set->norm_part);
      if (set->products) graddot::test_product(*set);
    }
    std::printf("vector kernels, %s: 150 random problems an element: ok\n", set->name);
  }
  if (sets.empty()) std::puts("vector kernels: none for this processor");
  return 0;
}
