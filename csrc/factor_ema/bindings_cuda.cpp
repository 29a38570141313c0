// factor_ema's ops on CUDA.
#include "../bindings.h"

#include <vector>

#include "factor_ema_cuda.h"
#include "rows_cuda.h"

namespace kbfgs::cuda {

namespace {

void factor_ema_cuda(const Call& call) {
  const Tensors& a_bar = call.tensors("a_bar");
  by_dtype("cuda", a_bar, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, a_bar[0]);
    std::vector<FactorLayer<T>> layers(a_bar.size());
    int64_t spoiled = 0;
    for (size_t i = 0; i < a_bar.size(); ++i) {
      FactorLayer<T>& l = layers[i];
      const int64_t n = a_bar[i].numel();
      l.A = args.given("A") ? args.state("A", i, n * n) : nullptr;
      l.a_bar = args.state("a_bar", i, n);
      set_X(args, l, i, n);
      l.n_a = int(n);
      spoiled += spoiled_elements(l.n_a);
    }
    int* words = args.template scratch<int>(spoiled);
    factor_ema(layers, call.number("decay"), args.flag("ok"), words, args.stream());
  });
}

void hessian_action_cuda(const Call& call) {
  const Tensors& y = call.tensors("y");
  by_dtype("cuda", y, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, y[0]);
    std::vector<ActionLayer<T>> layers(y.size());
    for (size_t i = 0; i < y.size(); ++i) {
      ActionLayer<T>& l = layers[i];
      const int64_t n = y[i].numel();
      l.y = args.state("y", i, n);
      set_X(args, l, i, n);
      l.s = args.input("s", i, n), l.lam = args.scalar("lam", i);
      l.n_a = int(n), l.z = args.scratch(l.m);
    }
    hessian_action(layers, args.stream());
  });
}

}  // namespace

Functions factor_ema_ops() {
  return {{"factor_ema_cuda", &factor_ema_cuda}, {"hessian_action_cuda", &hessian_action_cuda}};
}

}  // namespace kbfgs::cuda
