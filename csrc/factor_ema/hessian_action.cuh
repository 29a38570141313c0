// y = X~'(X~ s)/m + lam*s (10) in two steps with a grid barrier between them. X comes from memory in
// the first and, as far as it fits, from L2 in the second.
#pragma once

#include "../common/columns.cuh"
#include "../common/matvec.cuh"

namespace kbfgs::cuda {

// z = X~ s, this block's rows. `before`: elements of X of the layers before, `part`: equal_part
// of all, counted with one column more so that a row always weighs something.
template <typename T, typename E>
__device__ __forceinline__ void rows_times_vector(
    const E* X, int64_t ld, int m, int d_in, int n_a, const T* s, T* z, int64_t before,
    int64_t part) {
  const RowShare share = row_share(m, d_in + 1, before, part);
  const T ones = n_a > d_in ? s[d_in] : T(0);  // the implied column of ones
  matvec_rows<T>(
      X, ld, d_in, share, Plain<T>{s}, nullptr, 0, false,
      [&](int row, T dot) { z[row] = dot + ones; });
}

// y = X~'z/m + lam*s for the columns of one tile; `inverse_m` is 1/m, from the host.
template <typename T, typename E>
__device__ __forceinline__ void columns_times_vector(
    const E* X, int64_t ld, int m, T inverse_m, int d_in, int n_a, const T* z, const T* s, T lam,
    T* y, int tile, T* room) {
  const int column = tile * kTileColumns + lane_id();
  T sum[1];
  column_sums<1>(
      X, ld, m, d_in, column, room, [&](int row, T x, T(&total)[1]) { total[0] += x * z[row]; },
      sum);
  if (warp_id() == 0 && column < n_a) y[column] = sum[0] * inverse_m + lam * s[column];
}

}  // namespace kbfgs::cuda
