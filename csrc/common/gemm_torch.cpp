// gemm.h by torch: MKL, OpenBLAS or Accelerate, whatever torch was built with.
#include "gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

namespace kbfgs {

namespace {

template <typename T>
at::Tensor view(const T* data, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::from_blob(
      const_cast<T*>(data), sizes, strides, at::CppTypeToScalarType<T>::value);
}

template <typename T>
at::Tensor view(const Matrix<T>& A) {
  return view(A.data, {A.rows, A.cols}, {A.row_stride, A.col_stride});
}

}  // namespace

template <typename T>
void gemm(T* C, int64_t ldc, const Matrix<T>& A, const Matrix<T>& B, double alpha, double beta) {
  at::Tensor out = view(C, {A.rows, B.cols}, {ldc, 1});
  at::addmm_out(out, out, view(A), view(B), beta, alpha);
}

template void gemm(float*, int64_t, const Matrix<float>&, const Matrix<float>&, double, double);
template void gemm(double*, int64_t, const Matrix<double>&, const Matrix<double>&, double, double);

}  // namespace kbfgs
