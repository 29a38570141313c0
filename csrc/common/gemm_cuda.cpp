// gemm_cuda.h by torch.
#include "gemm_cuda.h"

#include "gemm_torch.h"

namespace kbfgs::cuda {

template <typename T>
void gemm(T* C, int64_t ldc, const Matrix<T>& A, const Matrix<T>& B, Device device) {
  const TorchTensor out = torch_view<T>({C, A.rows, B.cols, ldc}, device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(
      out.get(), torch_view(A, device).get(), torch_view(B, device).get()));
}

template void gemm(float*, int64_t, const Matrix<float>&, const Matrix<float>&, Device);
template void gemm(double*, int64_t, const Matrix<double>&, const Matrix<double>&, Device);

}  // namespace kbfgs::cuda
