// The CUDA solution of an EmbeddingProblem behind a plain C++ interface, free of torch's headers.
#pragma once

#include <cstddef>

#include "../embedding.h"

namespace graddot {

// Bytes of device memory that solving the problem needs beside its results.
size_t embedding_workspace_bytes(const EmbeddingProblem& problem);

// Solves the problem in `stream` (a cudaStream_t of the current device), without waiting for it.
// Returns null, or the message of a launch that failed. Bitwise repeatable: no atomics, and every
// sum runs in an order that the ids alone decide. An id outside the table traps on the device.
const char* embedding_dots_cuda(const EmbeddingProblem& problem, void* workspace, void* stream);

}  // namespace graddot
