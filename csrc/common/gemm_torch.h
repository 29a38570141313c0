// A matrix as torch's products take it.
#pragma once

#include "gemm.h"
#include "torch_tensor.h"

namespace kbfgs {

template <typename T>
TorchTensor torch_view(const Matrix<T>& A, Device device) {
  return torch_view(
      A.data, {A.rows, A.cols}, {A.row_stride, A.col_stride}, kDtype<T>, device);
}

}  // namespace kbfgs
