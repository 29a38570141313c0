// spectral's op on CUDA.
#include "../bindings.h"

#include <ATen/ops/mm.h>

#include <stdexcept>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../common/cuda_arguments.h"
#include "spectral.h"
#include "spectral_cuda.h"

namespace kbfgs::cuda {

namespace {

// The work of a layer as matrices: four of k x k, and X behind the fifth.
struct Matrices {
  Tensor P, X, short_side, G, B, Y, Z;
  bool wide;
};

Matrices matrices(const Tensor& P, const Tensor& work) {
  const int64_t n_g = P.size(0), n_a = P.size(1), k = std::min(n_g, n_a), size = k * k;
  const auto square = [&](int64_t i) { return work.narrow(0, i * size, size).view({k, k}); };
  const Tensor X = work.narrow(0, 5 * size, n_g * n_a).view({n_g, n_a});
  const bool wide = n_g <= n_a;
  return {P, X, wide ? X : X.t(), square(0), square(1), square(2), square(3), wide};
}

template <typename T>
PolarLayer<T> layer_of(const Matrices& m, double* partial) {
  return {m.P.data_ptr<T>(), m.X.data_ptr<T>(), m.G.data_ptr<T>(), m.B.data_ptr<T>(),
          m.Z.data_ptr<T>(), partial, int(m.P.size(0)), int(m.P.size(1)), int(m.G.size(0))};
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
    std::vector<Matrices> m;
    std::unordered_set<const void*> places;
    for (size_t i = 0; i < P.size(); ++i) {
      args.state("P", i, P[i].numel());
      args.state("work", i, args.tensor("work", i).numel());
      if (work[i].numel() < polar_workspace(P[i].size(0), P[i].size(1)))
        throw std::invalid_argument("work is too small");
      if (!places.insert(work[i].data_ptr()).second)
        throw Unsupported("the cuda kernels work on all layers at once: work is shared");
      m.push_back(matrices(P[i], work[i]));
    }
    double* partial = args.template scratch<double>(polar_partials() * int64_t(P.size()));
    const auto layers = [&] {
      std::vector<PolarLayer<T>> out;
      for (size_t i = 0; i < m.size(); ++i)
        out.push_back(layer_of<T>(m[i], partial + polar_partials() * int64_t(i)));
      return out;
    };
    scale_to_one(layers(), args.stream());
    for (auto& l : m) at::mm_out(l.G, l.short_side, l.short_side.t());  // (16)
    normalise(layers(), ridge, args.stream());                         // (17)
    for (size_t t = 0; t < iterations.size(); ++t) {                   // (18)
      const auto& [a, b, c] = iterations[t];
      const bool first = t == 0, last = t + 1 == iterations.size();
      for (auto& l : m) at::mm_out(l.B, l.G, l.G);
      quintic(layers(), a, b, c, ridge, first, last, args.stream());
      for (auto& l : m) {
        if (!last) {
          at::mm_out(l.Y, l.B, l.G);
          at::mm_out(l.G, l.B, l.Y);
        }
        if (!first) {
          at::mm_out(l.Y, l.B, l.Z);
          std::swap(l.Y, l.Z);
        }
      }
    }
    for (auto& l : m) l.wide ? at::mm_out(l.P, l.Z, l.X) : at::mm_out(l.P, l.X, l.Z);  // (19)
  });
}

}  // namespace

Functions spectral_ops() {
  return {{"polar_cuda", &polar_cuda}};
}

}  // namespace kbfgs::cuda
