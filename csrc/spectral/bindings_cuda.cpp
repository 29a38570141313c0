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

// The work of a layer as matrices: four of k x k, and X behind the fifth.
template <typename T>
struct Matrices {
  T *P, *X, *G, *B, *Y, *Z;
  int64_t n_g, n_a, k;

  Matrices(T* P, T* work, int64_t n_g, int64_t n_a)
      : P(P), n_g(n_g), n_a(n_a), k(std::min(n_g, n_a)) {
    const int64_t size = k * k;
    G = work, B = G + size, Y = B + size, Z = Y + size, X = work + 5 * size;
  }
  bool wide() const { return n_g <= n_a; }
  Matrix<T> x() const { return {X, n_g, n_a, n_a}; }
  Matrix<T> short_side() const { return wide() ? x() : x().transposed(); }
  Matrix<T> square(const T* data) const { return {data, k, k, k}; }
};

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
      m.emplace_back(p, room, P[i].size(0), P[i].size(1));
    }
    double* partial = args.template scratch<double>(polar_partials() * int64_t(P.size()));
    const auto layers = [&] {
      std::vector<PolarLayer<T>> out;
      for (size_t i = 0; i < m.size(); ++i)
        out.push_back(
            {m[i].P, m[i].X, m[i].G, m[i].B, m[i].Z, partial + polar_partials() * int64_t(i),
             int(m[i].n_g), int(m[i].n_a), int(m[i].k)});
      return out;
    };
    const auto multiply = [&](T* out, const Matrix<T>& left, const Matrix<T>& right) {
      gemm(out, right.cols, left, right, P[0].device());
    };
    const auto multiply_squares = [&](const Matrices<T>& l, T* out, const T* left, const T* right) {
      multiply(out, l.square(left), l.square(right));
    };
    scale_to_one(layers(), args.stream());
    for (const auto& l : m) multiply(l.G, l.short_side(), l.short_side().transposed());  // (16)
    normalise(layers(), ridge, args.stream());                                           // (17)
    for (size_t t = 0; t < iterations.size(); ++t) {                                     // (18)
      const auto& [a, b, c] = iterations[t];
      const bool first = t == 0, last = t + 1 == iterations.size();
      for (const auto& l : m) multiply_squares(l, l.B, l.G, l.G);
      quintic(layers(), a, b, c, ridge, first, last, args.stream());
      for (auto& l : m) {
        if (!last) {
          multiply_squares(l, l.Y, l.B, l.G);
          multiply_squares(l, l.G, l.B, l.Y);
        }
        if (!first) {
          multiply_squares(l, l.Y, l.B, l.Z);
          std::swap(l.Y, l.Z);
        }
      }
    }
    for (const auto& l : m)
      l.wide() ? multiply(l.P, l.square(l.Z), l.x()) : multiply(l.P, l.x(), l.square(l.Z));  // (19)
  });
}

}  // namespace

Functions spectral_ops() {
  return {{"polar_cuda", &polar_cuda}};
}

}  // namespace kbfgs::cuda
