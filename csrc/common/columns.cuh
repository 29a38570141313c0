// Sums down the columns of a row-major matrix: X~'z for the matrix-free Hessian action and the column
// means. A block has a tile of 32 columns and all rows, so the sums need no second pass and no atomics.
#pragma once

#include "device.cuh"

namespace kbfgs::cuda {

constexpr int kTileColumns = kWarp;  // one column per lane: a warp reads 128 consecutive bytes a row
constexpr int kRowsInFlight = 8;     // per warp, loaded before the first is used

inline int column_tiles(int n) { return (n + kTileColumns - 1) / kTileColumns; }

// sum[k] over the rows of term(row, x)[k], for the column of this lane, in the lanes of warp 0.
// `column` >= d_in is the implied column of ones (or past the end, and then ignored by the caller).
// `room`: kN x 32 values per warp. E is T, or a 16-bit type that is widened.
template <int kN, typename T, typename E, typename Term>
__device__ __forceinline__ void column_sums(
    const E* X, int64_t ld, int m, int d_in, int column, T* room, const Term& term, T (&sum)[kN]) {
  const int warps = warps_per_block();
#pragma unroll
  for (int k = 0; k < kN; ++k) sum[k] = T(0);
  const bool stored = column < d_in;
  const E* from = X + warp_id() * ld + column;  // X[row][column]
  const int64_t step = warps * ld;
  int row = warp_id();
  for (; row + (kRowsInFlight - 1) * warps < m; row += kRowsInFlight * warps) {
    T x[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) x[u] = stored ? T(widened(from[u * step])) : T(1);
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) term(row + u * warps, x[u], sum);
    from += kRowsInFlight * step;
  }
#pragma unroll 1
  for (; row < m; row += warps, from += step) term(row, stored ? T(widened(*from)) : T(1), sum);
  __syncthreads();  // the room may still be read by an earlier use
#pragma unroll
  for (int k = 0; k < kN; ++k) room[(warp_id() * kN + k) * kWarp + lane_id()] = sum[k];
  __syncthreads();
  if (warp_id() != 0) return;
#pragma unroll
  for (int k = 0; k < kN; ++k) {
    sum[k] = T(0);
    for (int w = 0; w < warps; ++w) sum[k] += room[(w * kN + k) * kWarp + lane_id()];
  }
}

}  // namespace kbfgs::cuda
