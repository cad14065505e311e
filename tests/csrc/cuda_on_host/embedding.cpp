// csrc/embedding.cpp's function, done by the CUDA kernels on the host.
#include "embedding.h"

#include "cuda_on_host.h"
//
#include "cuda/embedding_kernels.cu"

namespace graddot {

void embedding_dots(const EmbeddingProblem& problem) {
  // Device memory is not cleared: nothing may depend on what it holds.
  std::vector<char> workspace(embedding_workspace_bytes(problem), '\xff');
  if (embedding_dots_cuda(problem, workspace.data(), nullptr)) {
    cuda_on_host::fail("launch failed");
  }
}

}  // namespace graddot
