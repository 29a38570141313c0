// gemm.h by torch: MKL, OpenBLAS or Accelerate, whatever torch was built with.
#include "gemm_torch.h"

namespace kbfgs {

template <typename T>
void gemm(T* C, int64_t ldc, const Matrix<T>& A, const Matrix<T>& B, double alpha, double beta) {
  const TorchTensor out = torch_view<T>({C, A.rows, B.cols, ldc}, kCpu);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
      out.get(), out.get(), torch_view(A, kCpu).get(), torch_view(B, kCpu).get(), beta, alpha));
}

template void gemm(float*, int64_t, const Matrix<float>&, const Matrix<float>&, double, double);
template void gemm(double*, int64_t, const Matrix<double>&, const Matrix<double>&, double, double);

}  // namespace kbfgs
