// The elementwise halves of (16) to (18). Layers of a launch have equally many blocks, each with the
// same share of its layer's elements, and a block leaves three numbers for the next launch to sum up:
// no atomics, so that a result is the same in every run. Elements per layer: scale_to_one 2 n_g n_a
// read, n_g n_a written; normalise 2 k^2 read, k^2 written; quintic 2 k^2 read, k^2 written, 2 k^2
// with `first`.
#include "spectral_cuda.h"

#include <algorithm>
#include <limits>

#include "../common/device.cuh"

namespace kbfgs::cuda {

namespace {

constexpr int kThreads = 256;
// Per layer, at most. 64 x 256 threads hold 64 KB under way at 4 bytes each; eight layers fill an H100.
constexpr int kBlocks = 64;
// Elements per thread; where there are fewer, a launch has fewer blocks.
constexpr int kShare = 4;
constexpr int kLargest = 0, kSquares = kBlocks, kTrace = 2 * kBlocks;

template <typename T>
struct PolarTable {
  PolarLayer<T> layer[kLayersPerLaunch];
  T tiny, largest, nan;  // of T
  double ridge, a, b, c;
  bool first, last;
  int blocks;  // per layer
};

// Calls body(i) for this block's elements of n.
template <typename Body>
__device__ __forceinline__ void for_each(int64_t n, int block, int blocks, const Body& body) {
  for (int64_t i = int64_t(block) * kThreads + int(threadIdx.x); i < n; i += blocks * kThreads)
    body(i);
}

// norm of (17) and what is added to the diagonal, by every thread for itself in the same order.
template <typename T>
__device__ __forceinline__ void norm_of(
    const PolarLayer<T>& l, const PolarTable<T>& t, double& norm, double& shift) {
  double squares = 0, trace = 0;
  for (int i = 0; i < t.blocks; ++i) {
    squares += l.partial[kSquares + i];
    trace += l.partial[kTrace + i];
  }
  shift = t.ridge * trace / l.k;
  norm = sqrt(squares) + shift;
  if (norm < double(t.tiny)) norm = double(t.tiny);  // a NaN stays
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    largest_kernel(const __grid_constant__ PolarTable<T> t) {
  const PolarLayer<T>& l = t.layer[blockIdx.x / t.blocks];
  const int block = int(blockIdx.x) % t.blocks;
  double* room = reinterpret_cast<double*>(shared_memory());
  double most = 0;
  for_each(int64_t(l.n_g) * l.n_a, block, t.blocks, [&](int64_t i) {
    const T x = l.P[i] < 0 ? -l.P[i] : l.P[i];
    // Something larger than every finite number stands for what is not finite.
    most = finite(x) ? (double(x) > most ? double(x) : most) : 2 * double(t.largest);
  });
  // A thread's later finite entries may not hide one that is not: `most` is then larger than all.
  room[threadIdx.x] = most;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half && room[threadIdx.x + half] > room[threadIdx.x])
      room[threadIdx.x] = room[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) l.partial[kLargest + block] = room[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scaled_kernel(const __grid_constant__ PolarTable<T> t) {
  const PolarLayer<T>& l = t.layer[blockIdx.x / t.blocks];
  double most = double(t.tiny);
  for (int i = 0; i < t.blocks; ++i)
    most = l.partial[kLargest + i] > most ? l.partial[kLargest + i] : most;
  const bool fine = most <= double(t.largest);
  for_each(int64_t(l.n_g) * l.n_a, int(blockIdx.x) % t.blocks, t.blocks, [&](int64_t i) {
    l.X[i] = fine ? l.P[i] / T(most) : t.nan;
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ PolarTable<T> t) {
  const PolarLayer<T>& l = t.layer[blockIdx.x / t.blocks];
  const int block = int(blockIdx.x) % t.blocks;
  double* room = reinterpret_cast<double*>(shared_memory());
  double sums[2] = {0, 0};
  for_each(int64_t(l.k) * l.k, block, t.blocks, [&](int64_t i) {
    const double g = double(l.G[i]);
    sums[0] += g * g;
    if (i / l.k == i % l.k) sums[1] += g;
  });
  block_sum<2>(sums, room);
  if (threadIdx.x == 0) {
    l.partial[kSquares + block] = sums[0];
    l.partial[kTrace + block] = sums[1];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(const __grid_constant__ PolarTable<T> t) {
  const PolarLayer<T>& l = t.layer[blockIdx.x / t.blocks];
  double norm, shift;
  norm_of(l, t, norm, shift);
  const T by = T(norm), more = T(shift / norm);
  for_each(int64_t(l.k) * l.k, int(blockIdx.x) % t.blocks, t.blocks, [&](int64_t i) {
    l.G[i] = l.G[i] / by + (i / l.k == i % l.k ? more : T(0));  // (17)
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quintic_kernel(const __grid_constant__ PolarTable<T> t) {
  const PolarLayer<T>& l = t.layer[blockIdx.x / t.blocks];
  double factor = 1;
  if (t.last) {
    double norm, shift;
    norm_of(l, t, norm, shift);
    factor = 1 / sqrt(norm);
  }
  const T a = T(factor * t.a), b = T(factor * t.b), c = T(factor * t.c);
  for_each(int64_t(l.k) * l.k, int(blockIdx.x) % t.blocks, t.blocks, [&](int64_t i) {
    const T r = (i / l.k == i % l.k ? a : T(0)) + (b * l.G[i] + c * l.B[i]);
    l.B[i] = r;
    if (t.first) l.Z[i] = r;
  });
}

template <typename T>
void launch_layers(
    void (*kernel)(PolarTable<T>), const std::vector<PolarLayer<T>>& layers, PolarTable<T> t,
    cudaStream_t stream) {
  t.tiny = std::numeric_limits<T>::min();
  t.largest = std::numeric_limits<T>::max();
  t.nan = std::numeric_limits<T>::quiet_NaN();
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    const size_t count = std::min<size_t>(kLayersPerLaunch, layers.size() - begin);
    int64_t most = 1;
    for (size_t i = 0; i < count; ++i) {
      const PolarLayer<T>& l = t.layer[i] = layers[begin + i];
      most = std::max(most, int64_t(l.n_g) * l.n_a);
    }
    const int64_t wanted = (most + kThreads * kShare - 1) / (kThreads * kShare);
    t.blocks = int(std::min<int64_t>(kBlocks, wanted));
    launch(
        kernel, {unsigned(count * t.blocks), kThreads, kThreads * sizeof(double), false}, stream,
        t);
  }
}

}  // namespace

int64_t polar_partials() { return 3 * kBlocks; }

template <typename T>
void scale_to_one(std::vector<PolarLayer<T>> layers, cudaStream_t stream) {
  launch_layers(&largest_kernel<T>, layers, PolarTable<T>{}, stream);
  launch_layers(&scaled_kernel<T>, layers, PolarTable<T>{}, stream);
}

template <typename T>
void normalise(std::vector<PolarLayer<T>> layers, double ridge, cudaStream_t stream) {
  PolarTable<T> t{};
  t.ridge = ridge;
  launch_layers(&squares_kernel<T>, layers, t, stream);
  launch_layers(&normalise_kernel<T>, layers, t, stream);
}

template <typename T>
void quintic(
    std::vector<PolarLayer<T>> layers, double a, double b, double c, double ridge, bool first,
    bool last, cudaStream_t stream) {
  PolarTable<T> t{};
  t.a = a, t.b = b, t.c = c, t.ridge = ridge, t.first = first, t.last = last;
  launch_layers(&quintic_kernel<T>, layers, t, stream);
}

template void scale_to_one<float>(std::vector<PolarLayer<float>>, cudaStream_t);
template void scale_to_one<double>(std::vector<PolarLayer<double>>, cudaStream_t);
template void normalise<float>(std::vector<PolarLayer<float>>, double, cudaStream_t);
template void normalise<double>(std::vector<PolarLayer<double>>, double, cudaStream_t);
template void quintic<float>(
    std::vector<PolarLayer<float>>, double, double, double, double, bool, bool, cudaStream_t);
template void quintic<double>(
    std::vector<PolarLayer<double>>, double, double, double, double, bool, bool, cudaStream_t);

}  // namespace kbfgs::cuda
