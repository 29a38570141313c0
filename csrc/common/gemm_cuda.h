// Matrix products on the device; the work is left to torch's cuBLAS, on its current stream.
#pragma once

#include "gemm.h"
#include "tensor.h"

namespace kbfgs::cuda {

// C = A*B; C is A.rows x B.cols with leading dimension ldc.
template <typename T>
void gemm(T* C, int64_t ldc, const Matrix<T>& A, const Matrix<T>& B, Device device);

}  // namespace kbfgs::cuda
