// lengths (23): a warp for each entry, one launch for all.
#include <algorithm>

#include "../common/device.cuh"
#include "kron_precondition_cuda.h"

namespace kbfgs::cuda {

namespace {

template <typename T>
struct LengthsTable {
  Lengths<T> entry[kLayersPerLaunch];
  bool shared;
};

template <typename T>
__global__ void __launch_bounds__(kWarp)
    lengths_kernel(const __grid_constant__ LengthsTable<T> t) {
  const Lengths<T>& l = t.entry[blockIdx.x];
  double size = *l.step_size;
  if (t.shared) {
    double norms = 0, rows = 0;
    for (int64_t i = threadIdx.x; i < l.n; i += kWarp) {
      const double length = length_of(l.norms[i]);
      norms += length * length;
      rows += l.roots[i] * l.roots[i];
    }
    size *= sqrt(warp_sum(norms)) / sqrt(warp_sum(rows));
  }
  for (int64_t i = threadIdx.x; i < l.n; i += kWarp) l.sizes[i] = size_of(l, i, size);
}

}  // namespace

template <typename T>
void lengths(std::vector<Lengths<T>> entries, bool shared, cudaStream_t stream) {
  for (size_t begin = 0; begin < entries.size(); begin += kLayersPerLaunch) {
    LengthsTable<T> t{};
    const size_t count = std::min<size_t>(kLayersPerLaunch, entries.size() - begin);
    std::copy_n(entries.begin() + begin, count, t.entry);
    t.shared = shared;
    launch(&lengths_kernel<T>, {unsigned(count), kWarp, 0, false}, stream, t);
  }
}

template void lengths<float>(std::vector<Lengths<float>>, bool, cudaStream_t);
template void lengths<double>(std::vector<Lengths<double>>, bool, cudaStream_t);

}  // namespace kbfgs::cuda
