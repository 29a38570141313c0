// Matrix products on pointers; the work is left to torch's BLAS.
#pragma once

#include <cstdint>

namespace kbfgs {

template <typename T>
struct Matrix {
  const T* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;

  Matrix(const T* data, int64_t rows, int64_t cols, int64_t ld)
      : Matrix(data, rows, cols, ld, 1) {}
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }

 private:
  Matrix(const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride)
      : data(data), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {}
};

// Elements from row to row of n, so that all begin on 64 bytes as the first does: into such a C products
// are fastest.
constexpr int64_t rounded_up(int64_t n) { return (n + 15) / 16 * 16; }

// C = beta*C + alpha*A*B; C is A.rows x B.cols with leading dimension ldc. beta = 0 does not read C.
template <typename T>
void gemm(T* C, int64_t ldc, const Matrix<T>& A, const Matrix<T>& B, double alpha, double beta);

}  // namespace kbfgs
