// A <- decay*A + (1-decay)*X~'X~/m and a_bar (1), for all layers in one cooperative launch.
//
// First every column of X: its mean, and whether its sum of squares is finite (a layer with one that
// is not keeps its A, so this must be known before any of A is written). This reads X once, and leaves
// it in L2 for what follows. Then, behind a grid barrier, the tiles of the upper half of A: n_a^2/2
// elements read, n_a^2 written (a tile and its mirror), m*n_a^2 FLOPs instead of the full product's
// 2*m*n_a^2. The column of ones is one more column of X~ to the loads, so the bias row and column of
// A come out of the same tiles. fp32 stays fp32; 16-bit X is multiplied on tensor cores, exactly.
#include "factor_ema_cuda.h"

#include <algorithm>

#include "../common/columns.cuh"
#include "../common/device.cuh"
#include "../common/tensor_cores.cuh"

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
  // Of 16-bit X: a thread brings two rows of a pack of columns to each side.
  static constexpr int kPack = 8;
  static constexpr int kNarrowSlab = kThreads * kPack / kTile * 2;  // rows: 18 KB for both sides
  static constexpr int kNarrowPitch = kTile + 8;  // of row pairs: no two lanes of a product share a bank
  static constexpr int kDepth = 16;  // rows of a tensor-core product
  // The two slabs; reused for the tile on its way out and for the column sums.
  static constexpr int kSharedElements = kNarrowSlab * kNarrowPitch;
};
static_assert(FactorShape::kSlab * 2 * FactorShape::kPitch <= FactorShape::kSharedElements);
static_assert(FactorShape::kTile * FactorShape::kPitch <= FactorShape::kSharedElements);
static_assert(FactorShape::kThreads * 2 <= FactorShape::kSharedElements);

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

// One tile of X~'X~/m, rows `top`.. and columns `left`.., left in `shared`.
template <typename T>
__device__ __forceinline__ void multiply_tile(
    const FactorLayer<T>& l, const T* X, int top, int left, T* shared) {
  using S = FactorShape;
  T* slab[2] = {shared, shared + S::kSlab * S::kPitch};
  const int column = threadIdx.x % S::kTile, first_row = threadIdx.x / S::kTile;
  constexpr int kRowStep = S::kThreads / S::kTile;
  const int ty = threadIdx.x / (S::kTile / S::kPer) * S::kPer;
  const int tx = threadIdx.x % (S::kTile / S::kPer) * S::kPer;
  T next[2][S::kLoads];  // the slab to come, under way while this one is multiplied
  auto fetch = [&](int row0) {
#pragma unroll
    for (int u = 0; u < S::kLoads; ++u) {
      const int row = row0 + first_row + u * kRowStep;
      next[0][u] = augmented(l, X, row, top + column);
      next[1][u] = augmented(l, X, row, left + column);
    }
  };
  T sum[S::kPer][S::kPer] = {};
  fetch(0);
  for (int row0 = 0; row0 < l.m; row0 += S::kSlab) {
    __syncthreads();
#pragma unroll
    for (int u = 0; u < S::kLoads; ++u) {
      const int place = (first_row + u * kRowStep) * S::kPitch + column;
      slab[0][place] = next[0][u];
      slab[1][place] = next[1][u];
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
  __syncthreads();
#pragma unroll
  for (int i = 0; i < S::kPer; ++i) {
#pragma unroll
    for (int j = 0; j < S::kPer; ++j) shared[(ty + i) * S::kPitch + tx + j] = sum[i][j] / T(l.m);
  }
}

// Rows `row` and `row` + 1 of a pack of columns of X~, as pairs.
template <typename E>
__device__ __forceinline__ void fetch_pairs(
    const FactorLayer<float>& l, const E* X, int row, int column,
    uint32_t (&pairs)[FactorShape::kPack]) {
  using S = FactorShape;
  Pack<E> x[2];
  static_assert(Pack<E>::kWidth == S::kPack);
  const E* from = X + row * l.ld + column;
  if (row + 1 < l.m && column + S::kPack <= l.d_in && aligned(from) && l.ld % S::kPack == 0) {
    x[0] = load_pack(from), x[1] = load_pack(from + l.ld);
  } else {
#pragma unroll
    for (int e = 0; e < S::kPack; ++e) {
      x[0].value[e] = augmented(l, X, row, column + e);
      x[1].value[e] = augmented(l, X, row + 1, column + e);
    }
  }
#pragma unroll
  for (int e = 0; e < S::kPack; ++e) pairs[e] = pair_of(x[0].value[e], x[1].value[e]);
}

// The same from 16-bit X on tensor cores: a warp has 16 rows and 32 columns of the tile.
template <typename E>
__device__ __forceinline__ void multiply_narrow_tile(
    const FactorLayer<float>& l, const E* X, int top, int left, float* shared) {
  using S = FactorShape;
  constexpr int kAcross = 4, kColumns = 8;  // products of a warp, and the columns of one
  uint32_t* slab[2];  // pairs of rows of the upper and the left side
  slab[0] = reinterpret_cast<uint32_t*>(shared);
  slab[1] = slab[0] + S::kNarrowSlab / 2 * S::kNarrowPitch;
  const int my_pair = threadIdx.x / (S::kTile / S::kPack);
  const int my_column = threadIdx.x % (S::kTile / S::kPack) * S::kPack;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int ty = warp_id() % 4 * 16, tx = warp_id() / 4 * kAcross * kColumns;
  uint32_t next[2][S::kPack];
  const auto fetch = [&](int row0) {
    fetch_pairs(l, X, row0 + 2 * my_pair, top + my_column, next[0]);
    fetch_pairs(l, X, row0 + 2 * my_pair, left + my_column, next[1]);
  };
  float sum[kAcross][4] = {};
  fetch(0);
  for (int row0 = 0; row0 < l.m; row0 += S::kNarrowSlab) {
    __syncthreads();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      uint32_t* to = slab[side] + my_pair * S::kNarrowPitch + my_column;
#pragma unroll
      for (int e = 0; e < S::kPack; e += 4) {
        store_pack(to + e, {next[side][e], next[side][e + 1], next[side][e + 2], next[side][e + 3]});
      }
    }
    __syncthreads();
    fetch(row0 + S::kNarrowSlab);
#pragma unroll
    for (int k = 0; k < S::kNarrowSlab; k += S::kDepth) {
      const uint32_t* upper = slab[0] + (k / 2 + t) * S::kNarrowPitch + ty + g;
      const uint32_t* side = slab[1] + (k / 2 + t) * S::kNarrowPitch + tx + g;
      constexpr int kHalf = S::kDepth / 4 * S::kNarrowPitch;  // 8 rows further down
      const uint32_t a[4] = {upper[0], upper[8], upper[kHalf], upper[kHalf + 8]};
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const uint32_t b[2] = {side[j * kColumns], side[j * kColumns + kHalf]};
        multiply_add(sum[j], a, b, E{});
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = ty + g + i / 2 * 8, column = tx + j * kColumns + 2 * t + i % 2;
      shared[row * S::kPitch + column] = sum[j][i] / float(l.m);
    }
  }
}

// The average, stored at the tile and at its mirror: from shared memory, so that both are written
// along rows.
template <typename T>
__device__ __forceinline__ void store_tile(
    const FactorTable<T>& t, const FactorLayer<T>& l, int top, int left, T* tile) {
  using S = FactorShape;
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
    l.X.visit([&](const auto* X) {
      if constexpr (sizeof(*X) == 2) {
        multiply_narrow_tile(l, X, top, left, shared);
      } else {
        multiply_tile(l, X, top, left, shared);
      }
    });
    store_tile(t, l, top, left, shared);
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
