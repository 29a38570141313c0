// y = X~'(X~ s)/m + lam*s (10) for all layers in one cooperative launch with one grid barrier: X is
// read twice, the second time from L2 as far as it fits; 4*m*n_a FLOPs.
#include <algorithm>

#include "factor_ema_cuda.h"
#include "hessian_action.cuh"

namespace kbfgs::cuda {

namespace {

struct ActionShape {
  static constexpr int kThreads = 256;  // 8 warps share the rows of a tile of columns
  static constexpr int kBlocksPerMultiprocessor = 3;  // 48 KB in flight at up to 80 registers a thread
  static constexpr int kSharedElements = kThreads;    // column sums
};

template <typename T>
struct ActionTable {
  ActionLayer<T> layer[kLayersPerLaunch];
  int layers;
  int column_tiles;
  int64_t part;  // of all elements, per block
};

template <typename T>
__global__ void __launch_bounds__(ActionShape::kThreads, ActionShape::kBlocksPerMultiprocessor)
    action_kernel(const __grid_constant__ ActionTable<T> t) {
  for (int i = 0; i < t.layers; ++i) {
    const ActionLayer<T>& l = t.layer[i];
    l.X.visit([&](const auto* X) {
      rows_times_vector(X, l.ld, l.m, l.d_in, l.n_a, l.s, l.z, l.before, t.part);
    });
  }
  grid_sync();
  T* room = reinterpret_cast<T*>(shared_memory());
  for (int tile = blockIdx.x, i = 0; tile < t.column_tiles; tile += gridDim.x) {
    while (i + 1 < t.layers && t.layer[i + 1].columns_before <= tile) ++i;
    const ActionLayer<T>& l = t.layer[i];
    const T lam = static_cast<T>(*l.lam);
    l.X.visit([&](const auto* X) {
      columns_times_vector(
          X, l.ld, l.m, l.inverse_m, l.d_in, l.n_a, static_cast<const T*>(l.z), l.s, lam, l.y,
          tile - l.columns_before, room);
    });
  }
}

}  // namespace

template <typename T>
void hessian_action(std::vector<ActionLayer<T>> layers, cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    ActionTable<T> t{};
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    int64_t rows = 0, total = 0;
    for (int i = 0; i < t.layers; ++i) {
      ActionLayer<T>& l = t.layer[i] = layers[begin + i];
      l.before = total;
      l.inverse_m = T(1) / T(l.m);
      l.columns_before = t.column_tiles;
      total += int64_t(l.m) * (l.d_in + 1);
      t.column_tiles += column_tiles(l.n_a);
      rows += l.m;
    }
    constexpr int kRows = ActionShape::kThreads / kWarp * kRowsAtOnce;
    const int64_t work = std::max<int64_t>(t.column_tiles, (rows + kRows - 1) / kRows);
    const int64_t most =
        int64_t(device_limits().multiprocessors) * ActionShape::kBlocksPerMultiprocessor;
    const int64_t blocks = std::min(most, work);
    t.part = equal_part(total, blocks);
    launch(
        &action_kernel<T>,
        {unsigned(blocks), ActionShape::kThreads,
         ActionShape::kSharedElements * unsigned(sizeof(T)), true},
        stream, t);
  }
}

template void hessian_action<float>(std::vector<ActionLayer<float>>, cudaStream_t);
template void hessian_action<double>(std::vector<ActionLayer<double>>, cudaStream_t);

}  // namespace kbfgs::cuda
