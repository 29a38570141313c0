// Averaged pairs and their dampings on their own: one block per layer, one launch for all layers.
// pair_ema: 5 n elements read twice (the second time from cache), 2 n written. double_damping: 3 n
// read twice, 2 n written, and with H a launch before and after that reads H once (products_cuda.cu).
#include "double_damping_cuda.h"

#include <algorithm>

#include "../common/products_cuda.h"
#include "damping.cuh"

namespace kbfgs::cuda {

namespace {

struct PairShape {
  // A thread has 2 elements of a vector of 1000: more threads would wait, fewer loop.
  static constexpr int kThreads = 512;
  static constexpr int kRoomBytes = kThreads / kWarp * 2 * int(sizeof(double));  // two sums
};

template <typename Layer>
struct Table {
  Layer layer[kLayersPerLaunch];
  int layers;
  double scalar;  // decay or mu1
  const bool* ok;
};

template <typename T>
__global__ void __launch_bounds__(PairShape::kThreads)
    pair_kernel(const __grid_constant__ Table<PairLayer<T>> t) {
  const PairLayer<T>& l = t.layer[blockIdx.x];
  const T decay = static_cast<T>(t.scalar), rest = static_cast<T>(1 - t.scalar);
  const Averaged<T, Change> s{l.s, {l.h_change}, decay, rest, true};
  const Averaged<T, Difference> y{l.y, {l.g_bar, l.g_next}, decay, rest, true};
  double bad[1] = {};
  for (int j = threadIdx.x; j < l.n; j += blockDim.x) bad[0] += !(finite(s(j)) && finite(y(j)));
  block_sum(bad, reinterpret_cast<double*>(shared_memory()));
  if (!flag(t.ok) || bad[0] != 0) return;
  for (int j = threadIdx.x; j < l.n; j += blockDim.x) {
    l.s[j] = s(j);
    l.y[j] = y(j);
  }
}

template <typename T>
__global__ void __launch_bounds__(PairShape::kThreads)
    damping_kernel(const __grid_constant__ Table<DampingLayer<T>> t) {
  if (!flag(t.ok)) return;
  const DampingLayer<T>& l = t.layer[blockIdx.x];
  const Damped<T> damped = damping<T>(
      l.n, l.s, l.y, l.Hy, t.scalar, *l.lam, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) {
    l.counts[kPowell] += damped.powell;
    l.counts[kLm] += damped.lm;
  }
  for (int j = threadIdx.x; j < l.n; j += blockDim.x) {
    const T s_j = damped.s_at(j), y_j = damped(j);
    l.s[j] = s_j;
    l.y[j] = y_j;
  }
}

// One block per layer.
template <typename Layer>
void launch_layers(
    void (*kernel)(Table<Layer>), const std::vector<Layer>& layers, double scalar, const bool* ok,
    cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    Table<Layer> t{};
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    std::copy_n(layers.begin() + begin, t.layers, t.layer);
    t.scalar = scalar;
    t.ok = ok;
    launch(
        kernel, {unsigned(t.layers), PairShape::kThreads, PairShape::kRoomBytes, false}, stream, t);
  }
}

template <typename T>
void multiply_by_H(const std::vector<DampingLayer<T>>& layers, cudaStream_t stream) {
  std::vector<Product<T>> products;
  for (const DampingLayer<T>& l : layers) {
    if (l.H != nullptr) products.push_back({l.H, l.y, l.Hy, l.n, 0});
  }
  multiply(products, stream);
}

}  // namespace

template <typename T>
void pair_ema(
    std::vector<PairLayer<T>> layers, double decay, const bool* ok, cudaStream_t stream) {
  launch_layers<PairLayer<T>>(&pair_kernel<T>, layers, decay, ok, stream);
}

template <typename T>
void double_damping(
    std::vector<DampingLayer<T>> layers, double mu1, const bool* ok, cudaStream_t stream) {
  multiply_by_H(layers, stream);
  launch_layers<DampingLayer<T>>(&damping_kernel<T>, layers, mu1, ok, stream);
  multiply_by_H(layers, stream);
}

template void pair_ema<float>(
    std::vector<PairLayer<float>>, double, const bool*, cudaStream_t);
template void pair_ema<double>(
    std::vector<PairLayer<double>>, double, const bool*, cudaStream_t);
template void double_damping<float>(
    std::vector<DampingLayer<float>>, double, const bool*, cudaStream_t);
template void double_damping<double>(
    std::vector<DampingLayer<double>>, double, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
