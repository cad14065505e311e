#pragma once

#include "rows.h"

struct __nv_bfloat16 {
  graddot::BFloat16 value;
  explicit operator float() const { return graddot::to_sum(value); }
};
