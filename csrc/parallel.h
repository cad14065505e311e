// The one thing that the CPU core asks of its host: threads.
#pragma once

#include <cstdint>
#include <functional>

namespace graddot {

// Calls body(begin, end) on disjoint ranges that cover [0, size), on as many threads as the host
// grants and at least `grain` apart. The extension forwards to PyTorch's thread pool (extension.cpp),
// the unit test to std::thread. body must not throw: PyTorch's pool would lose the message.
void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace graddot
