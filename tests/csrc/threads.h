// What the unit tests share: threads without torch, and a check that ends the program.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "parallel.h"

namespace graddot {

inline int64_t num_threads = 1;

void parallel_for(int64_t size, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t chunk = (size + num_threads - 1) / num_threads;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < size; begin += chunk) {
    threads.emplace_back(body, begin, std::min(begin + chunk, size));
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

inline void expect(bool ok, const std::string& what) {
  if (!ok) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::exit(1);
  }
}

inline std::mt19937 generator(0);

inline int64_t random_int(int64_t below) {
  return std::uniform_int_distribution<int64_t>(0, below - 1)(generator);
}

}  // namespace graddot
