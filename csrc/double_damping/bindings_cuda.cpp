// double_damping's ops on CUDA.
#include "../bindings.h"

#include <vector>

#include "../common/cuda_arguments.h"
#include "double_damping_cuda.h"
#include "measure_arguments.h"
#include "measure_cuda.h"

namespace kbfgs::cuda {

namespace {

void pair_ema_cuda(const Call& call) {
  const Tensors& s = call.tensors("s");
  by_dtype("cuda", s, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, s[0]);
    std::vector<PairLayer<T>> layers;
    for (size_t i = 0; i < s.size(); ++i) {
      const int64_t n = s[i].numel();
      layers.push_back(
          {args.state("s", i, n), args.state("y", i, n), args.input("h_change", i, n),
           args.input("g_bar", i, n), args.input("g_bar_next", i, n), int(n)});
    }
    pair_ema(layers, call.number("decay"), args.flag("ok"), args.stream());
  });
}

void double_damping_cuda(const Call& call) {
  const Tensors& s = call.tensors("s");
  by_dtype("cuda", s, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, s[0]);
    const bool with_H = args.given("H");
    std::vector<DampingLayer<T>> layers;
    for (size_t i = 0; i < s.size(); ++i) {
      const int64_t n = s[i].numel();
      layers.push_back(
          {args.state("s", i, n), args.state("y", i, n),
           with_H ? args.state("Hy", i, n) : args.input("Hy", i, n),
           with_H ? args.state("H", i, n * n) : nullptr, args.integers("counts", i, 4),
           args.scalar("lam", i), int(n)});
    }
    double_damping(layers, call.number("mu1"), args.flag("ok"), args.stream());
  });
}

void measure_inputs_cuda(const Call& call) {
  const Tensors& norms = call.tensors("norms");
  by_dtype("cuda", norms, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, norms[0]);
    const auto layers = inputs_of<decltype(zero)>(args, call);
    measure_inputs(layers, call.number("share"), args.flag("ok"), args.stream());
  });
}

void measure_pair_cuda(const Call& call) {
  const Tensors& g_bar = call.tensors("g_bar");
  by_dtype("cuda", g_bar, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, g_bar[0]);
    const auto layers = pairs_of<decltype(zero)>(args, g_bar);
    measure_pair(layers, call.number("share"), args.flag("ok"), args.stream());
  });
}

}  // namespace

Functions double_damping_ops() {
  return {
      {"pair_ema_cuda", &pair_ema_cuda},
      {"double_damping_cuda", &double_damping_cuda},
      {"measure_inputs_cuda", &measure_inputs_cuda},
      {"measure_pair_cuda", &measure_pair_cuda},
  };
}

}  // namespace kbfgs::cuda
