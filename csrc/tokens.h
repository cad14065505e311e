// Token ids: checked, and grouped into segments of equal id.
#pragma once

#include <cstdint>
#include <vector>

namespace graddot {

// A (rows, cols) matrix of ids, int32 or int64, any strides: broadcast rows have row_stride 0.
struct IdMatrix {
  const void* data;
  bool is_int64;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  int64_t at(int64_t row, int64_t col) const {
    const int64_t offset = row * row_stride + col * col_stride;
    return is_int64 ? static_cast<const int64_t*>(data)[offset]
                    : static_cast<const int32_t*>(data)[offset];
  }
};

// Throws std::out_of_range (IndexError in Python) naming the first id outside the table.
void check_ids(const IdMatrix& ids, int64_t num_embeddings, const char* name);

struct Token {
  int64_t id;
  int64_t index;  // row * cols + col
};

// The tokens that are not padding, by id, and in token order where ids are equal.
std::vector<Token> sorted_tokens(const IdMatrix& ids, int64_t padding_idx);

// All training tokens of one id, and the val tokens of that id: ranges of the sorted tokens.
struct Segment {
  int64_t id;
  int64_t begin, end;
  int64_t val_begin, val_end;
  int64_t cost_begin;  // tokens in all segments before this one
  int64_t cost() const { return end - begin + val_end - val_begin; }
};

// One segment an id of `tokens`, in ascending order of ids; with `matched_only`, of those ids that
// occur in `val_tokens` too.
std::vector<Segment> make_segments(const std::vector<Token>& tokens,
                                   const std::vector<Token>& val_tokens, bool matched_only);

}  // namespace graddot
