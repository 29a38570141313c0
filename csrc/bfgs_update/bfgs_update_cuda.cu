// The gated rank-2 update (8), (9) on its own, for all layers: n^2 elements of each H read and
// written, 4 n^2 FLOPs, one launch; H y, where it is not given, is one launch and one read more.
#include "bfgs_update_cuda.h"

#include <algorithm>

#include "../common/products_cuda.h"
#include "gate.cuh"

namespace kbfgs::cuda {

namespace {

struct UpdateShape {
  static constexpr int kThreads = 256;  // a block decides (8) for itself: few, large blocks
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kRoomBytes = kThreads / kWarp * 5 * int(sizeof(double));  // gate's sums
};

template <typename T>
struct UpdateTable {
  BfgsLayer<T> layer[kLayersPerLaunch];
  int layers;
  int64_t part;  // of all elements, per block
  const bool* ok;
};

template <typename T>
__global__ void __launch_bounds__(UpdateShape::kThreads)
    update_kernel(const __grid_constant__ UpdateTable<T> t) {
  double* room = reinterpret_cast<double*>(shared_memory());
  const bool ok = flag(t.ok);
  for (int i = 0; i < t.layers; ++i) {
    const BfgsLayer<T>& l = t.layer[i];
    const RowShare share = row_share(l.n, l.n, l.before, t.part);
    if (share.begin == share.end) continue;
    const Gate<T> g = gate(l.n, l.s, l.y, static_cast<const T*>(l.Hy), l.c, ok, room);
    if (share.begin == 0 && threadIdx.x == 0) count(l.counts, g, ok);
    if (g.accept) update_rows<T>(g, l.H, l.n, share, l.s, l.Hy, nullptr, 0);
  }
}

}  // namespace

template <typename T>
void bfgs_update(
    std::vector<BfgsLayer<T>> layers, bool Hy_given, const bool* ok, cudaStream_t stream) {
  if (!Hy_given) {
    std::vector<Product<T>> products;
    for (const BfgsLayer<T>& l : layers) products.push_back({l.H, l.y, l.Hy, l.n, 0});
    multiply(products, stream);
  }
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    UpdateTable<T> t{};
    t.ok = ok;
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    int64_t rows = 0, total = 0;
    for (int i = 0; i < t.layers; ++i) {
      t.layer[i] = layers[begin + i];
      t.layer[i].before = total;
      total += int64_t(t.layer[i].n) * t.layer[i].n;
      rows += t.layer[i].n;
    }
    const int64_t most =
        int64_t(device_limits().multiprocessors) * UpdateShape::kBlocksPerMultiprocessor;
    constexpr int kWarps = UpdateShape::kThreads / kWarp;
    const int64_t blocks = std::min<int64_t>(most, (rows + kWarps - 1) / kWarps);
    t.part = equal_part(total, blocks);
    launch(
        &update_kernel<T>,
        {unsigned(blocks), UpdateShape::kThreads, UpdateShape::kRoomBytes, false}, stream, t);
  }
}

template void bfgs_update<float>(
    std::vector<BfgsLayer<float>>, bool, const bool*, cudaStream_t);
template void bfgs_update<double>(
    std::vector<BfgsLayer<double>>, bool, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
