// lbfgs_two_loop's ops on CUDA: the recursion's kernel; the compact form is for the caller.
#include "../bindings.h"

#include <stdexcept>
#include <vector>

#include "../common/cuda_arguments.h"
#include "lbfgs_two_loop_cuda.h"

namespace kbfgs::cuda {

namespace {

void lbfgs_two_loop_cuda(const Call& call) {
  const Tensors& out = call.tensors("out");
  by_dtype("cuda", out, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, out[0]);
    std::vector<RingLayer<T>> layers(out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      RingLayer<T>& l = layers[i];
      const Strided<T*> rows = args.columns("Q", i);
      const int64_t p = args.tensor("S", i).size(0), n = rows.m;
      l.Q = rows.data, l.ld = rows.stride, l.n = int(n), l.columns = int(rows.columns);
      l.out = args.state("out", i, n * rows.columns);
      l.ld_out = rows.columns;
      l.S = args.input("S", i, p * n), l.Y = args.input("Y", i, p * n);
      l.rho = args.input("rho", i, p);
      l.pushed = args.integers("pushed", i, 1), l.p = int(p);
      if (!two_loop_fits(l.n, l.columns, l.p, sizeof(T)))
        throw Unsupported("the recursion's kernel holds columns of up to 8192 and their memory");
    }
    two_loop(layers, args.stream());
  });
}

void lbfgs_push_cuda(const Call& call) {
  const Tensors& S = call.tensors("S");
  by_dtype("cuda", S, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, S[0]);
    std::vector<PushLayer<T>> layers;
    for (size_t i = 0; i < S.size(); ++i) {
      const int64_t n = args.tensor("s", i).numel(), p = args.tensor("rho", i).numel();
      if (p == 0) throw std::invalid_argument("a ring without rows cannot take a pair");
      layers.push_back(
          {args.state("S", i, p * n), args.state("Y", i, p * n), args.state("rho", i, p),
           args.integers("pushed", i, 1), args.integers("counts", i, 4), args.input("s", i, n),
           args.input("y", i, n), args.input("c", i, n), int(n), int(p)});
    }
    push(layers, args.flag("ok"), args.stream());
  });
}

}  // namespace

Functions lbfgs_two_loop_ops() {
  return {{"lbfgs_two_loop_cuda", &lbfgs_two_loop_cuda}, {"lbfgs_push_cuda", &lbfgs_push_cuda}};
}

}  // namespace kbfgs::cuda
