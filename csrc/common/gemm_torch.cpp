// gemm.h by torch: MKL, OpenBLAS or Accelerate, whatever torch was built with.
#include "gemm_torch.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "parallel.h"

namespace kbfgs {

namespace {

// Where rows of C begin anywhere, the stores of a product cross cache lines: 1001 x 1001 by 1001,
// floats, one thread of an AMD Zen 4 with MKL, takes 36 ms, and 24 into rows that begin on 64 bytes;
// how A and B lie makes no difference. So rows of C are made in a panel, and copied; 128 of them at
// a time multiply as fast as all.
constexpr int64_t kLine = 64, kPanelRows = 128;
constexpr int64_t kPanelBytes = 1 << 20;  // of a thread
constexpr int64_t kWorth = 64;            // terms of a sum that pay for the copy

template <typename T>
void product(T* C, int64_t ldc, const Matrix<T>& A, const Matrix<T>& B, double alpha, double beta) {
  const TorchTensor out = torch_view<T>({C, A.rows, B.cols, ldc}, kCpu);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
      out.get(), out.get(), torch_view(A, kCpu).get(), torch_view(B, kCpu).get(), beta, alpha));
}

}  // namespace

template <typename T>
void gemm(T* C, int64_t ldc, const Matrix<T>& A, const Matrix<T>& B, double alpha, double beta) {
  constexpr int64_t line = kLine / sizeof(T), elements = kPanelBytes / sizeof(T);
  const bool lies_well = reinterpret_cast<uintptr_t>(C) % kLine == 0 && ldc % line == 0;
  const int64_t ld = rounded_up(B.cols), most = std::min(kPanelRows, elements / ld);
  if (lies_well || beta != 0 || A.cols < kWorth || B.cols < 2 * line || most < line)
    return product(C, ldc, A, B, alpha, beta);

  const int64_t units = (A.rows + most - 1) / most;
  parallel_units(units, A.rows * B.cols, [&](int64_t unit) {
    thread_local std::unique_ptr<T[]> storage(new T[elements + line]);
    const int64_t behind = reinterpret_cast<uintptr_t>(storage.get()) % kLine / sizeof(T);
    T* panel = storage.get() + line - behind;
    const int64_t begin = unit * most, end = std::min(begin + most, A.rows);
    Matrix<T> rows = A;
    rows.data += begin * A.row_stride, rows.rows = end - begin;
    product(panel, ld, rows, B, alpha, 0);
    for (int64_t i = begin; i < end; ++i)
      std::copy_n(panel + (i - begin) * ld, B.cols, C + i * ldc);
  });
}

template void gemm(float*, int64_t, const Matrix<float>&, const Matrix<float>&, double, double);
template void gemm(double*, int64_t, const Matrix<double>&, const Matrix<double>&, double, double);

}  // namespace kbfgs
