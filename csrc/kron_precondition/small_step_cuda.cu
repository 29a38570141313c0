// P = H_g M H_a (3), and the step (4) where the weights are given, for layers of up to about 128: both
// factors on chip, all such layers in one launch.
//
// A block has 16 columns of one layer's P: M H_a for these columns, then H_g times that, each n_g x 16.
// M and H_g come through the same room in shared memory, one after the other; H_a gives only its 16
// columns (its rows, it is symmetric). Per block n_g*n_a + n_g^2 + 16 n_a elements read, from L2 but
// for the first block of a layer; 2*n_g*n_a*(n_g + n_a) FLOPs per layer.
#include <algorithm>

#include "../common/matvec.cuh"
#include "kron_precondition_cuda.h"

namespace kbfgs::cuda {

namespace {

struct SmallShape {
  static constexpr int kThreads = 256;
  static constexpr int kColumns = 16;  // 8 blocks for n_a = 128: one layer on 8 multiprocessors
  static constexpr int kLargest = 128;
  static constexpr int kRows = 4;  // per thread at a time: 4 multiply-adds per element of the right
  static constexpr int kRowGroups = kThreads / kColumns;
};

template <typename T>
struct SmallTable {
  SmallLayer<T> layer[kLayersPerLaunch];
  int layers;
  const bool* ok;
};

// `left` (rows x inner) into shared memory, rows padded to whole packs and zero in the padding.
template <typename T>
__device__ __forceinline__ void stage(const T* left, int rows, int inner, T* place) {
  const int pitch = padded<T>(inner);
  for (int row = warp_id(); row < rows; row += warps_per_block()) {
    for (int k = lane_id(); k < pitch; k += kWarp) {
      place[row * pitch + k] = k < inner ? left[row * inner + k] : T(0);
    }
  }
}

// finish(row, product) for this thread's column of left x right, right padded (pitch x 16).
template <typename T, typename Finish>
__device__ __forceinline__ void multiply(
    const T* left, int rows, int inner, const T* right, const Finish& finish) {
  using S = SmallShape;
  constexpr int kWidth = Pack<T>::kWidth;
  const int column = threadIdx.x % S::kColumns, group = threadIdx.x / S::kColumns;
  const int pitch = padded<T>(inner);
  for (int row0 = group; row0 < rows; row0 += S::kRows * S::kRowGroups) {
    T sum[S::kRows] = {};
    for (int k = 0; k < pitch; k += kWidth) {
      T x[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) x[e] = right[(k + e) * S::kColumns + column];
#pragma unroll
      for (int r = 0; r < S::kRows; ++r) {
        const int row = row0 + r * S::kRowGroups;
        if (row >= rows) continue;
        const Pack<T> a = load_pack(left + row * pitch + k);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sum[r] += a.value[e] * x[e];
      }
    }
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      const int row = row0 + r * S::kRowGroups;
      if (row < rows) finish(row, sum[r]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(SmallShape::kThreads, 1)
    small_kernel(const __grid_constant__ SmallTable<T> t) {
  using S = SmallShape;
  int i = 0;
  while (i + 1 < t.layers && t.layer[i + 1].blocks_before <= int(blockIdx.x)) ++i;
  const SmallLayer<T>& l = t.layer[i];
  const int column = (int(blockIdx.x) - l.blocks_before) * S::kColumns +
                     int(threadIdx.x) % S::kColumns;
  const int pitch_a = padded<T>(l.n_a), pitch_g = padded<T>(l.n_g);
  T* left = reinterpret_cast<T*>(shared_memory());    // M, then H_g
  T* columns_a = left + l.n_g * max(pitch_a, pitch_g);  // of H_a
  T* product = columns_a + pitch_a * S::kColumns;       // M H_a, or M

  // 16 columns of a matrix of `rows` rows, padded with zeros to `pitch`.
  const auto take_columns = [&](const T* matrix, int rows, int pitch, T* place) {
    for (int k = threadIdx.x / S::kColumns; k < pitch; k += S::kRowGroups) {
      const bool inside = k < rows && column < l.n_a;
      place[k * S::kColumns + threadIdx.x % S::kColumns] =
          inside ? matrix[k * l.n_a + column] : T(0);
    }
  };
  if (l.H_a != nullptr) {
    stage(l.M, l.n_g, l.n_a, left);
    take_columns(l.H_a, l.n_a, pitch_a, columns_a);
  } else {
    take_columns(l.M, l.n_g, pitch_g, product);
  }
  for (int k = l.n_g * S::kColumns + int(threadIdx.x); k < pitch_g * S::kColumns;
       k += S::kThreads) {
    product[k] = T(0);  // the padding of H_g's rows meets it
  }
  __syncthreads();

  const bool ok = flag(t.ok);
  const T step_size = l.W.data ? static_cast<T>(*l.step_size) : T(0);
  auto finish = [&](int row, T direction) {
    if (column >= l.n_a) return;
    T* P = l.P + row * l.n_a + column;
    if (l.W.data == nullptr) {
      *P = direction;
      return;
    }
    const Numbers<T>& parameters = column < l.d_in ? l.W : l.b;
    const int at = column < l.d_in ? row * l.d_in + column : row;
    const T before = parameters.at(at);
    if (ok) parameters.set(at, before - step_size * direction);  // (4)
    *P = before;
  };
  if (l.H_g == nullptr) {
    multiply(left, l.n_g, l.n_a, columns_a, finish);
    return;
  }
  if (l.H_a != nullptr) {
    multiply(left, l.n_g, l.n_a, columns_a, [&](int row, T sum) {
      product[row * S::kColumns + threadIdx.x % S::kColumns] = sum;
    });
    __syncthreads();
  }
  stage(l.H_g, l.n_g, l.n_g, left);
  __syncthreads();
  multiply(left, l.n_g, l.n_g, product, finish);
}

int64_t shared_elements(int64_t n_g, int64_t n_a) {
  const int64_t pitch_a = (n_a + 3) / 4 * 4, pitch_g = (n_g + 3) / 4 * 4;
  return n_g * std::max(pitch_a, pitch_g) + (pitch_a + pitch_g) * SmallShape::kColumns;
}

}  // namespace

bool small_step_fits(int64_t n_g, int64_t n_a, int64_t element_bytes) {
  return std::max(n_g, n_a) <= SmallShape::kLargest &&
         shared_elements(n_g, n_a) * element_bytes <= device_limits().shared_bytes;
}

template <typename T>
void small_step(std::vector<SmallLayer<T>> layers, const bool* ok, cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    SmallTable<T> t{};
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    t.ok = ok;
    int64_t blocks = 0, shared = 0;
    for (int i = 0; i < t.layers; ++i) {
      SmallLayer<T>& l = t.layer[i] = layers[begin + i];
      l.blocks_before = int(blocks);
      blocks += (l.n_a + SmallShape::kColumns - 1) / SmallShape::kColumns;
      shared = std::max(shared, shared_elements(l.n_g, l.n_a));
    }
    launch(
        &small_kernel<T>,
        {unsigned(blocks), SmallShape::kThreads, unsigned(shared * int64_t(sizeof(T))), false},
        stream, t);
  }
}

template void small_step<float>(std::vector<SmallLayer<float>>, const bool*, cudaStream_t);
template void small_step<double>(std::vector<SmallLayer<double>>, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
