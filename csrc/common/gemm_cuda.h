// Matrix products on the device by torch's cuBLAS, on its current stream, in the precision that
// torch.backends.cuda.matmul is set to: fp32 unless the user asked.
#pragma once

#include "gemm_torch.h"

namespace kbfgs::cuda {

// out = left*right.
inline void multiply(
    const TorchTensor& out, const TorchTensor& left, const TorchTensor& right) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), left.get(), right.get()));
}

}  // namespace kbfgs::cuda
