// Restarts (12): one block per layer, one launch. A block reads and writes a few counters; H and tr A
// are touched only where it comes to a restart, which is rare, so that part is plain.
#include <algorithm>

#include "../common/device.cuh"
#include "../double_damping/damping.cuh"
#include "bfgs_update_cuda.h"

namespace kbfgs::cuda {

namespace {

struct RestartShape {
  static constexpr int kThreads = 256;
  static constexpr int kRoomBytes = kThreads / kWarp * int(sizeof(double));  // the trace's sum
};

template <typename T>
struct RestartTable {
  Restart<T> layer[kLayersPerLaunch];
  int layers;
  int64_t after;
};

// lam + tr A; all threads of the block take part and get the same answer.
template <typename T>
__device__ double damped_trace(const Restart<T>& l, double* room) {
  double trace[1] = {};
  if (l.A) {
    for (int64_t i = threadIdx.x; i < l.n; i += blockDim.x) trace[0] += l.A[i * (l.n + 1)];
  } else {
    l.X.visit([&](const auto* X) {
      for (int64_t r = 0; r < l.m; ++r) {
        for (int64_t j = threadIdx.x; j < l.d_in; j += blockDim.x) {
          const double x = widened(X[r * l.ld + j]);
          trace[0] += x * x;
        }
      }
    });
    trace[0] /= double(l.m);
  }
  block_sum(trace, room);
  return *l.lam + trace[0] + (l.A ? 0.0 : double(l.n - l.d_in));
}

template <typename T>
__global__ void __launch_bounds__(RestartShape::kThreads)
    restart_kernel(const __grid_constant__ RestartTable<T> t) {
  const Restart<T>& l = t.layer[blockIdx.x];
  const int64_t accepted = l.counts[kAccepted], rejected = l.counts[kRejected];
  const int64_t begin = accepted > l.marks[0] ? rejected : l.marks[1];
  bool now = rejected - begin >= t.after || (l.force && *l.force);
  double divisor = 1;
  if (now && l.lam) {
    divisor = damped_trace(l, reinterpret_cast<double*>(shared_memory()));
    now = finite(divisor);
  }
  __syncthreads();  // every thread has read the marks
  if (threadIdx.x == 0) {
    l.marks[0] = accepted;
    l.marks[1] = now ? rejected : begin;
    l.marks[2] += now;
    if (now && l.pushed) *l.pushed = 0;
  }
  if (!now) return;
  const T value = static_cast<T>(1 / divisor);
  for (int64_t e = threadIdx.x; e < l.n * l.n; e += blockDim.x) {
    l.H[e] = e % (l.n + 1) == 0 ? value : T(0);
  }
}

}  // namespace

template <typename T>
void restart(std::vector<Restart<T>> layers, int64_t after, cudaStream_t stream) {
  for (size_t begin = 0; begin < layers.size(); begin += kLayersPerLaunch) {
    RestartTable<T> t{};
    t.layers = int(std::min<size_t>(kLayersPerLaunch, layers.size() - begin));
    std::copy_n(layers.begin() + begin, t.layers, t.layer);
    t.after = after;
    launch(
        &restart_kernel<T>,
        {unsigned(t.layers), RestartShape::kThreads, RestartShape::kRoomBytes, false}, stream, t);
  }
}

template void restart<float>(std::vector<Restart<float>>, int64_t, cudaStream_t);
template void restart<double>(std::vector<Restart<double>>, int64_t, cudaStream_t);

}  // namespace kbfgs::cuda
