#include "tokens.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace graddot {

void check_ids(const IdMatrix& ids, int64_t num_embeddings, const char* name) {
  for (int64_t n = 0; n < ids.rows; ++n) {
    for (int64_t t = 0; t < ids.cols; ++t) {
      const int64_t id = ids.at(n, t);
      if (id < 0 || id >= num_embeddings) {
        throw std::out_of_range(std::string(name) + "[" + std::to_string(n) + ", " +
                                std::to_string(t) + "] is " + std::to_string(id) +
                                ", outside the table of " + std::to_string(num_embeddings) +
                                " embeddings");
      }
    }
  }
}

// A stable radix sort: one pass an 11-bit digit, as many as the largest id needs (two for the
// vocabularies in use), whatever the size of the table.
std::vector<Token> sorted_tokens(const IdMatrix& ids, int64_t padding_idx) {
  constexpr int kDigitBits = 11;
  constexpr int64_t kMask = (int64_t{1} << kDigitBits) - 1;
  std::vector<Token> tokens;
  tokens.reserve(static_cast<size_t>(ids.rows * ids.cols));
  int64_t largest = 0;
  for (int64_t n = 0; n < ids.rows; ++n) {
    for (int64_t t = 0; t < ids.cols; ++t) {
      const int64_t id = ids.at(n, t);
      if (id != padding_idx) {
        tokens.push_back({id, n * ids.cols + t});
        largest = std::max(largest, id);
      }
    }
  }
  std::vector<Token> buffer(tokens.size());
  for (int shift = 0; shift < 63 && (largest >> shift) > 0; shift += kDigitBits) {
    std::array<int64_t, kMask + 2> offset{};
    for (const Token& token : tokens) {
      ++offset[static_cast<size_t>(((token.id >> shift) & kMask) + 1)];
    }
    for (size_t digit = 1; digit < offset.size(); ++digit) {
      offset[digit] += offset[digit - 1];
    }
    for (const Token& token : tokens) {
      const auto digit = static_cast<size_t>((token.id >> shift) & kMask);
      buffer[static_cast<size_t>(offset[digit]++)] = token;
    }
    tokens.swap(buffer);
  }
  return tokens;
}

namespace {

// The end of the run of equal ids that begins at `begin`.
int64_t run_end(const std::vector<Token>& tokens, int64_t begin) {
  const auto size = static_cast<int64_t>(tokens.size());
  int64_t end = begin;
  while (end < size && tokens[end].id == tokens[begin].id) {
    ++end;
  }
  return end;
}

}  // namespace

std::vector<Segment> make_segments(const std::vector<Token>& tokens,
                                   const std::vector<Token>& val_tokens, bool matched_only) {
  const auto size = static_cast<int64_t>(tokens.size());
  const auto val_size = static_cast<int64_t>(val_tokens.size());
  std::vector<Segment> segments;
  int64_t cost = 0;
  for (int64_t begin = 0, val = 0; begin < size;) {
    const int64_t id = tokens[begin].id;
    while (val < val_size && val_tokens[val].id < id) {
      ++val;
    }
    const bool matched = val < val_size && val_tokens[val].id == id;
    const int64_t end = run_end(tokens, begin), val_end = matched ? run_end(val_tokens, val) : val;
    if (matched || !matched_only) {
      segments.push_back({id, begin, end, val, val_end, cost});
      cost += segments.back().cost();
    }
    begin = end;
    val = val_end;
  }
  return segments;
}

}  // namespace graddot
