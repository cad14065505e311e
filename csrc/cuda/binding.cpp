// Gives the CUDA kernels torch's current stream and memory of torch's allocator.

#include "../binding.h"

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "embedding_kernels.h"

namespace graddot {

void embedding_dots_cuda(const EmbeddingProblem& problem, const Tensor& grad) {
  const auto device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  // The allocator hands freed memory only to work that this stream runs later.
  const auto bytes = static_cast<int64_t>(embedding_workspace_bytes(problem));
  const Tensor workspace =
      torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, grad.device());
  if (const char* error = embedding_dots_cuda(problem, workspace.mutable_data_ptr(), stream)) {
    throw std::runtime_error(std::string("graddot embedding kernels: ") + error);
  }
}

}  // namespace graddot
