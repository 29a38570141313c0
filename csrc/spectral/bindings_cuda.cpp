// spectral's op on CUDA.
#include "../bindings.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../common/cuda_arguments.h"
#include "../common/gemm_cuda.h"
#include "spectral.h"
#include "spectral_cuda.h"

namespace kbfgs::cuda {

namespace {

template <typename T>
struct Viewed {
  T* data;
  TorchTensor view;
};

// The work of a layer as matrices: four of k x k, and X behind the fifth.
template <typename T>
struct Matrices {
  int64_t n_g, n_a, k;
  bool wide;
  Viewed<T> P, X, G, B, Y, Z;
  TorchTensor short_side, short_side_transposed;
};

template <typename T>
Matrices<T> matrices(T* P, T* work, int64_t n_g, int64_t n_a, Device device) {
  const int64_t k = std::min(n_g, n_a);
  const bool wide = n_g <= n_a;
  const auto viewed = [&](T* data, int64_t rows, int64_t cols) -> Viewed<T> {
    return {data, torch_view<T>({data, rows, cols, cols}, device)};
  };
  const auto square = [&](int64_t i) { return viewed(work + i * k * k, k, k); };
  const Viewed<T> X = viewed(work + 5 * k * k, n_g, n_a);
  const TorchTensor transposed =
      torch_view(Matrix<T>(X.data, n_g, n_a, n_a).transposed(), device);
  return {n_g, n_a, k, wide, viewed(P, n_g, n_a), X, square(0), square(1), square(2), square(3),
          wide ? X.view : transposed, wide ? transposed : X.view};
}

// Products are cuBLAS's, TF32 where torch allows it.
void polar_cuda(const Call& call) {
  const Tensors &P = call.tensors("P"), &work = call.tensors("work");
  const auto iterations = quintics(call.numbers("coefficients"));
  if (call.has("shifts")) throw Unsupported("the cuda kernels make no inverses");
  const double ridge = call.number("ridge");
  by_dtype("cuda", P, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, P[0]);
    std::vector<Matrices<T>> m;
    std::unordered_set<const void*> places;
    for (size_t i = 0; i < P.size(); ++i) {
      T* p = args.state("P", i, P[i].numel());
      T* room = args.state("work", i, args.tensor("work", i).numel());
      if (work[i].numel() < polar_workspace(P[i].size(0), P[i].size(1)))
        throw std::invalid_argument("work is too small");
      if (!places.insert(room).second)
        throw Unsupported("the cuda kernels work on all layers at once: work is shared");
      m.push_back(matrices(p, room, P[i].size(0), P[i].size(1), P[i].device()));
    }
    double* partial = args.template scratch<double>(polar_partials() * int64_t(P.size()));
    const auto layers = [&] {
      std::vector<PolarLayer<T>> out;
      for (const auto& l : m)
        out.push_back(
            {l.P.data, l.X.data, l.G.data, l.B.data, l.Z.data,
             partial + polar_partials() * int64_t(out.size()), int(l.n_g), int(l.n_a), int(l.k)});
      return out;
    };
    scale_to_one(layers(), args.stream());
    for (const auto& l : m) multiply(l.G.view, l.short_side, l.short_side_transposed);  // (16)
    normalise(layers(), ridge, args.stream());                                          // (17)
    for (size_t t = 0; t < iterations.size(); ++t) {                                    // (18)
      const auto& [a, b, c] = iterations[t];
      const bool first = t == 0, last = t + 1 == iterations.size();
      for (const auto& l : m) multiply(l.B.view, l.G.view, l.G.view);
      quintic(layers(), a, b, c, ridge, first, last, args.stream());
      for (auto& l : m) {
        if (!last) {
          multiply(l.Y.view, l.B.view, l.G.view);
          multiply(l.G.view, l.B.view, l.Y.view);
        }
        if (!first) {
          multiply(l.Y.view, l.B.view, l.Z.view);
          std::swap(l.Y, l.Z);
        }
      }
    }
    for (const auto& l : m)
      l.wide ? multiply(l.P.view, l.Z.view, l.X.view)  // (19)
             : multiply(l.P.view, l.X.view, l.Z.view);
  });
}

}  // namespace

Functions spectral_ops() {
  return {{"polar_cuda", &polar_cuda}};
}

}  // namespace kbfgs::cuda
