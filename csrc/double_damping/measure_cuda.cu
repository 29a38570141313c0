// measure_inputs (21): a thread per layer. measure_pair (22): a block per layer, 3 n elements read, 2 n
// of them again from cache, 2 n written. One launch for all layers.
#include "measure_cuda.h"

#include <algorithm>

#include "../common/device.cuh"

namespace kbfgs::cuda {

namespace {

struct MeasureShape {
  static constexpr int kThreads = 512;  // a thread has 2 elements of a vector of 1000
  static constexpr int kRoomBytes = kThreads / kWarp * 2 * int(sizeof(double));  // two sums
};

template <typename Layer>
struct MeasureTable {
  Layer layer[kLayersPerLaunch];
  double share;
  const bool* ok;
};

template <typename T>
__global__ void __launch_bounds__(kWarp)
    measure_inputs_kernel(const __grid_constant__ MeasureTable<MeasureInputs<T>> t) {
  if (threadIdx.x == 0 && flag(t.ok)) kbfgs::measure_inputs(t.layer[blockIdx.x], t.share);
}

template <typename T>
__global__ void __launch_bounds__(MeasureShape::kThreads)
    measure_pair_kernel(const __grid_constant__ MeasureTable<MeasurePair<T>> t) {
  if (!flag(t.ok)) return;
  const MeasurePair<T>& l = t.layer[blockIdx.x];
  double sums[2] = {};
  for (int j = threadIdx.x; j < l.n; j += blockDim.x) {
    const double h = double(l.h_change[j]), g = double(l.g_next[j] - l.g_bar[j]);
    sums[0] += h * h;
    sums[1] += g * g;
  }
  block_sum(sums, reinterpret_cast<double*>(shared_memory()));
  const double ss = followed(*l.ss, sums[0], t.share), yy = followed(*l.yy, sums[1], t.share);
  const T by = T(unit(ss, yy));
  for (int j = threadIdx.x; j < l.n; j += blockDim.x) {
    l.g_bar[j] *= by;
    l.g_next[j] *= by;
  }
  __syncthreads();  // every thread has read the averages
  if (threadIdx.x == 0) {
    *l.ss = ss;
    *l.yy = yy;
  }
}

template <typename Layer>
void launch_layers(
    void (*kernel)(MeasureTable<Layer>), const std::vector<Layer>& layers, double share,
    const bool* ok, unsigned threads, unsigned room, cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    MeasureTable<Layer> t{};
    const size_t count = std::min<size_t>(kLayersPerLaunch, layers.size() - begin);
    std::copy_n(layers.begin() + begin, count, t.layer);
    t.share = share;
    t.ok = ok;
    launch(kernel, {unsigned(count), threads, room, false}, stream, t);
  }
}

}  // namespace

template <typename T>
void measure_inputs(
    std::vector<MeasureInputs<T>> layers, double share, const bool* ok, cudaStream_t stream) {
  launch_layers(&measure_inputs_kernel<T>, layers, share, ok, kWarp, 0, stream);
}

template <typename T>
void measure_pair(
    std::vector<MeasurePair<T>> layers, double share, const bool* ok, cudaStream_t stream) {
  launch_layers(
      &measure_pair_kernel<T>, layers, share, ok, MeasureShape::kThreads,
      MeasureShape::kRoomBytes, stream);
}

template void measure_inputs<float>(
    std::vector<MeasureInputs<float>>, double, const bool*, cudaStream_t);
template void measure_inputs<double>(
    std::vector<MeasureInputs<double>>, double, const bool*, cudaStream_t);
template void measure_pair<float>(
    std::vector<MeasurePair<float>>, double, const bool*, cudaStream_t);
template void measure_pair<double>(
    std::vector<MeasurePair<double>>, double, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
