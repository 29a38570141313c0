// X of a layer from a call: rows, columns, and an implied one of ones where n_a is a column more.
#pragma once

#include "../common/cuda_arguments.h"

namespace kbfgs::cuda {

template <typename T, typename Layer>
void set_X(CudaArguments<T>& args, Layer& l, size_t i, int64_t n_a) {
  const Strided<Numbers<T>> rows = args.rows("X", i, n_a);
  l.X = rows.data, l.ld = rows.stride, l.m = int(rows.m), l.d_in = int(rows.columns);
}

}  // namespace kbfgs::cuda
