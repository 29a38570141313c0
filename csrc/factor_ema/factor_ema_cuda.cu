// A <- decay*A + (1-decay)*X~'X~/m and a_bar (1), for all layers in one cooperative launch.
//
// First every column of X: its mean, and whether its sum of squares is finite (a layer with one that
// is not keeps its A, so this must be known before any of A is written). This reads X once, and leaves
// it in L2 for what follows. Then, behind a grid barrier, the tiles of the upper half of A: n_a^2/2
// elements read, n_a^2 written (a tile and its mirror), m*n_a^2 FLOPs instead of the full product's
// 2*m*n_a^2. The column of ones is one more column of X~ to the loads, so the bias row and column of
// A come out of the same tiles. fp32 stays fp32 (no tensor cores).
#include "factor_ema_cuda.h"

#include <algorithm>

#include "../common/columns.cuh"
#include "../common/device.cuh"

namespace kbfgs::cuda {

namespace {

struct FactorShape {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerMultiprocessor = 2;  // 128 registers a thread; one loads, one works
  static constexpr int kTile = 64;   // of A; 456 of them in the MNIST autoencoder for 132 SMs
  static constexpr int kSlab = 16;   // rows of X at a time: 8 KB of fp32 for both sides
  static constexpr int kPer = 4;     // 4 x 4 entries per thread: 16 multiply-adds per 8 loads
  static constexpr int kPitch = kTile + 4;  // keeps 16-byte alignment, spreads rows over the banks
  static constexpr int kLoads = kTile * kSlab / kThreads;  // per thread, side and slab
  // The two slabs; reused for the tile on its way out and for the column sums.
  static constexpr int kSharedElements = kTile * kPitch;
};
static_assert(FactorShape::kSlab * 2 <= FactorShape::kTile);
static_assert(FactorShape::kThreads * 2 <= FactorShape::kTile * FactorShape::kPitch);

template <typename T>
struct FactorTable {
  FactorLayer<T> layer[kLayersPerLaunch];
  int layers;
  int column_tiles;
  int tiles;
  T decay, rest;
  const bool* ok;
  int* spoiled;  // per column tile: columns whose sum of squares is not finite
};

template <typename T, typename E>
__device__ __forceinline__ void column_statistics(
    const FactorLayer<T>& l, const E* X, int tile, T* room, int* spoiled) {
  const int column = tile * kTileColumns + lane_id();
  T sum[2];  // x, x^2
  column_sums<2>(
      X, l.ld, l.m, l.d_in, column, room,
      [](int, T x, T(&total)[2]) {
        total[0] += x;
        total[1] += x * x;
      },
      sum);
  if (warp_id() != 0) return;
  const bool inside = column < l.n_a;
  if (inside) l.a_bar[column] = sum[0] / T(l.m);
  const int bad = warp_sum(int(inside && !finite(sum[1])));
  if (lane_id() == 0) *spoiled = bad;
}

// X~ of one row and column; zero outside.
template <typename T, typename E>
__device__ __forceinline__ E augmented(const FactorLayer<T>& l, const E* X, int row, int column) {
  if (row >= l.m || column >= l.n_a) return rounded_to<E>(0);
  return column < l.d_in ? X[row * l.ld + column] : rounded_to<E>(1);
}

template <typename T>
__device__ __forceinline__ void load_four(const T* from, T (&to)[FactorShape::kPer]) {
  constexpr int kWidth = Pack<T>::kWidth;
#pragma unroll
  for (int i = 0; i < FactorShape::kPer; i += kWidth) {
    const Pack<T> pack = load_pack(from + i);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) to[i + e] = pack.value[e];
  }
}

// One tile of X~'X~, rows `top`.. and columns `left`.., in the threads' registers. 16-bit X is widened
// on its way on chip.
template <typename T, typename E>
__device__ __forceinline__ void multiply_tile(
    const FactorLayer<T>& l, const E* X, int top, int left, T* shared,
    T (&sum)[FactorShape::kPer][FactorShape::kPer]) {
  using S = FactorShape;
  T* slab[2] = {shared, shared + S::kSlab * S::kPitch};
  const int column = threadIdx.x % S::kTile, first_row = threadIdx.x / S::kTile;
  constexpr int kRowStep = S::kThreads / S::kTile;
  const int ty = threadIdx.x / (S::kTile / S::kPer) * S::kPer;
  const int tx = threadIdx.x % (S::kTile / S::kPer) * S::kPer;
  E next[2][S::kLoads];  // the slab to come, under way while this one is multiplied
  auto fetch = [&](int row0) {
#pragma unroll
    for (int u = 0; u < S::kLoads; ++u) {
      const int row = row0 + first_row + u * kRowStep;
      next[0][u] = augmented(l, X, row, top + column);
      next[1][u] = augmented(l, X, row, left + column);
    }
  };
#pragma unroll
  for (int i = 0; i < S::kPer; ++i) {
#pragma unroll
    for (int j = 0; j < S::kPer; ++j) sum[i][j] = T(0);
  }
  fetch(0);
  for (int row0 = 0; row0 < l.m; row0 += S::kSlab) {
    __syncthreads();
#pragma unroll
    for (int u = 0; u < S::kLoads; ++u) {
      const int place = (first_row + u * kRowStep) * S::kPitch + column;
      slab[0][place] = widened(next[0][u]);
      slab[1][place] = widened(next[1][u]);
    }
    __syncthreads();
    fetch(row0 + S::kSlab);
#pragma unroll
    for (int k = 0; k < S::kSlab; ++k) {
      T a[S::kPer], b[S::kPer];
      load_four(slab[0] + k * S::kPitch + ty, a);
      load_four(slab[1] + k * S::kPitch + tx, b);
#pragma unroll
      for (int i = 0; i < S::kPer; ++i) {
#pragma unroll
        for (int j = 0; j < S::kPer; ++j) sum[i][j] += a[i] * b[j];
      }
    }
  }
}

// The average, stored at the tile and at its mirror: through shared memory, so that both are written
// along rows.
template <typename T>
__device__ __forceinline__ void store_tile(
    const FactorTable<T>& t, const FactorLayer<T>& l, int top, int left, T* tile,
    const T (&sum)[FactorShape::kPer][FactorShape::kPer]) {
  using S = FactorShape;
  const int ty = threadIdx.x / (S::kTile / S::kPer) * S::kPer;
  const int tx = threadIdx.x % (S::kTile / S::kPer) * S::kPer;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < S::kPer; ++i) {
#pragma unroll
    for (int j = 0; j < S::kPer; ++j) tile[(ty + i) * S::kPitch + tx + j] = sum[i][j] / T(l.m);
  }
  __syncthreads();
  const int column = threadIdx.x % S::kTile;
  for (int i = threadIdx.x / S::kTile; i < S::kTile; i += S::kThreads / S::kTile) {
    if (top + i >= l.n_a || left + column >= l.n_a) continue;
    T* entry = l.A + static_cast<int64_t>(top + i) * l.n_a + left + column;
    T& value = tile[i * S::kPitch + column];
    value = t.decay * *entry + t.rest * value;
    *entry = value;
  }
  if (top == left) return;
  __syncthreads();
  for (int i = threadIdx.x / S::kTile; i < S::kTile; i += S::kThreads / S::kTile) {
    if (left + i >= l.n_a || top + column >= l.n_a) continue;
    l.A[static_cast<int64_t>(left + i) * l.n_a + top + column] = tile[column * S::kPitch + i];
  }
}

template <typename T>
__global__ void __launch_bounds__(FactorShape::kThreads, FactorShape::kBlocksPerMultiprocessor)
    factor_kernel(const __grid_constant__ FactorTable<T> t) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  for (int tile = blockIdx.x, i = 0; tile < t.column_tiles; tile += gridDim.x) {
    while (i + 1 < t.layers && t.layer[i + 1].columns_before <= tile) ++i;
    const FactorLayer<T>& l = t.layer[i];
    l.X.visit([&](const auto* X) {
      column_statistics(l, X, tile - l.columns_before, shared, t.spoiled + tile);
    });
  }
  if (t.tiles == 0) return;
  grid_sync();
  if (!flag(t.ok)) return;
  for (int tile = blockIdx.x, i = 0; tile < t.tiles; tile += gridDim.x) {
    while (i + 1 < t.layers && t.layer[i + 1].tiles_before <= tile) ++i;
    const FactorLayer<T>& l = t.layer[i];
    int bad = 0;
    for (int c = 0; c < (l.n_a + kTileColumns - 1) / kTileColumns; ++c) {
      bad += t.spoiled[l.columns_before + c];
    }
    if (bad) continue;
    // Tile number to (row, column) of the upper half, row by row.
    int row = 0, column = tile - l.tiles_before;
    for (int width = (l.n_a + FactorShape::kTile - 1) / FactorShape::kTile; column >= width;) {
      column -= width--;
      ++row;
    }
    const int top = row * FactorShape::kTile, left = (row + column) * FactorShape::kTile;
    T sum[FactorShape::kPer][FactorShape::kPer];
    l.X.visit([&](const auto* X) { multiply_tile(l, X, top, left, shared, sum); });
    store_tile(t, l, top, left, shared, sum);
  }
}

}  // namespace

template <typename T>
void factor_ema(
    std::vector<FactorLayer<T>> layers, double decay, const bool* ok, int* spoiled,
    cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    FactorTable<T> t{};
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    t.decay = static_cast<T>(decay);
    t.rest = static_cast<T>(1 - decay);
    t.ok = ok;
    t.spoiled = spoiled;
    for (int i = 0; i < t.layers; ++i) {
      FactorLayer<T>& l = t.layer[i] = layers[begin + i];
      l.columns_before = t.column_tiles;
      l.tiles_before = t.tiles;
      t.column_tiles += column_tiles(l.n_a);
      const int side = (l.n_a + FactorShape::kTile - 1) / FactorShape::kTile;
      if (l.A != nullptr) t.tiles += side * (side + 1) / 2;
    }
    spoiled += t.column_tiles;
    const int most = device_limits().multiprocessors * FactorShape::kBlocksPerMultiprocessor;
    launch(
        &factor_kernel<T>,
        {unsigned(std::min(most, std::max(t.tiles, t.column_tiles))), FactorShape::kThreads,
         FactorShape::kSharedElements * unsigned(sizeof(T)), true},
        stream, t);
  }
}

template void factor_ema<float>(
    std::vector<FactorLayer<float>>, double, const bool*, int*, cudaStream_t);
template void factor_ema<double>(
    std::vector<FactorLayer<double>>, double, const bool*, int*, cudaStream_t);

}  // namespace kbfgs::cuda
