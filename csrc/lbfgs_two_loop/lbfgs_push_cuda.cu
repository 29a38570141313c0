// A pair into each ring if it passes the gate (8): one block per layer, one launch. 3 n elements read
// (the pair twice, from cache), 2 n written.
#include <algorithm>

#include "../bfgs_update/gate.cuh"
#include "lbfgs_two_loop_cuda.h"

namespace kbfgs::cuda {

namespace {

struct PushShape {
  static constexpr int kThreads = 512;  // two elements of a vector of 1000 each
  static constexpr int kRoomBytes = kThreads / kWarp * 5 * int(sizeof(double));  // gate's sums
};

template <typename T>
struct PushTable {
  PushLayer<T> layer[kLayersPerLaunch];
  int layers;
  const bool* ok;
};

template <typename T>
__global__ void __launch_bounds__(PushShape::kThreads)
    push_kernel(const __grid_constant__ PushTable<T> t) {
  const PushLayer<T>& l = t.layer[blockIdx.x];
  const bool ok = flag(t.ok);
  const int64_t pushed = *l.pushed;
  // The barriers in gate() also keep thread 0's increment below behind every read above.
  const Gate<T> g = gate(
      l.n, l.s, l.y, static_cast<const T*>(nullptr), l.c, ok,
      reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) count(l.counts, g, ok);
  if (!g.accept) return;
  const int64_t row = pushed % l.p;
  for (int j = threadIdx.x; j < l.n; j += blockDim.x) {
    l.S[row * l.n + j] = l.s[j];
    l.Y[row * l.n + j] = l.y[j];
  }
  if (threadIdx.x == 0) {
    l.rho[row] = g.rho;
    *l.pushed = pushed + 1;
  }
}

}  // namespace

template <typename T>
void push(std::vector<PushLayer<T>> layers, const bool* ok, cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    PushTable<T> t{};
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    std::copy_n(layers.begin() + begin, t.layers, t.layer);
    t.ok = ok;
    launch(
        &push_kernel<T>, {unsigned(t.layers), PushShape::kThreads, PushShape::kRoomBytes, false},
        stream, t);
  }
}

template void push<float>(std::vector<PushLayer<float>>, const bool*, cudaStream_t);
template void push<double>(std::vector<PushLayer<double>>, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
