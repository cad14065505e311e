#pragma once

#include "rows.h"

struct __half {
  graddot::Half value;
  explicit operator float() const { return graddot::to_sum(value); }
};
