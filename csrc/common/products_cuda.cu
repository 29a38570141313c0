// out = H v for all layers: n^2 elements of each H read once, 2 n^2 FLOPs, one launch.
#include "products_cuda.h"

#include <algorithm>

#include "matvec.cuh"

namespace kbfgs::cuda {

namespace {

struct ProductShape {
  static constexpr int kThreads = 256;  // 8 warps, 16 KB of loads in flight (matvec.cuh)
  static constexpr int kBlocksPerMultiprocessor = 3;  // 48 KB in flight at 80 registers a thread
};

template <typename T>
struct ProductTable {
  Product<T> product[kLayersPerLaunch];
  int count;
  int64_t part;  // of all elements, per block
};

template <typename T>
__global__ void __launch_bounds__(
    ProductShape::kThreads, ProductShape::kBlocksPerMultiprocessor)
    product_kernel(const __grid_constant__ ProductTable<T> t) {
  for (int i = 0; i < t.count; ++i) {
    const Product<T>& p = t.product[i];
    const RowShare share = row_share(p.n, p.n, p.before, t.part);
    matvec_rows<T>(
        p.H, p.n, p.n, share, Plain<T>{p.v}, nullptr, 0, false,
        [&](int row, T dot) { p.out[row] = dot; });
  }
}

}  // namespace

template <typename T>
void multiply(std::vector<Product<T>> products, cudaStream_t stream) {
  for (size_t begin = 0; begin < products.size(); begin += kLayersPerLaunch) {
    ProductTable<T> t{};
    t.count = int(std::min<size_t>(kLayersPerLaunch, products.size() - begin));
    int64_t rows = 0, total = 0;
    for (int i = 0; i < t.count; ++i) {
      t.product[i] = products[begin + i];
      t.product[i].before = total;
      total += int64_t(t.product[i].n) * t.product[i].n;
      rows += t.product[i].n;
    }
    // No more blocks than there are groups of rows for their warps.
    constexpr int kRows = ProductShape::kThreads / kWarp * kRowsAtOnce;
    const int64_t most =
        int64_t(device_limits().multiprocessors) * ProductShape::kBlocksPerMultiprocessor;
    const int64_t blocks = std::min<int64_t>(most, (rows + kRows - 1) / kRows);
    t.part = equal_part(total, blocks);
    launch(&product_kernel<T>, {unsigned(blocks), ProductShape::kThreads, 0, false}, stream, t);
  }
}

template void multiply<float>(std::vector<Product<float>>, cudaStream_t);
template void multiply<double>(std::vector<Product<double>>, cudaStream_t);

}  // namespace kbfgs::cuda
