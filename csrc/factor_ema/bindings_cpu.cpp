// factor_ema's ops on the CPU.
#include "../bindings.h"

#include <vector>

#include "../common/cpu_arguments.h"
#include "factor_ema.h"

namespace kbfgs {

namespace {

void factor_ema_cpu(const Call& call) {
  const Tensors& a_bar = call.tensors("a_bar");
  by_dtype("cpu", a_bar, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    std::vector<FactorEma<T>> layers;
    for (size_t i = 0; i < a_bar.size(); ++i) {
      const int64_t n = a_bar[i].numel();
      layers.push_back(
          {args.given("A") ? args.state("A", i, n * n) : nullptr, args.state("a_bar", i, n),
           args.rows("X", i, n)});
    }
    factor_ema(layers, call.number("decay"), args.read("ok"));
  });
}

void hessian_action_cpu(const Call& call) {
  const Tensors& y = call.tensors("y");
  by_dtype("cpu", y, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    std::vector<HessianAction<T>> layers;
    for (size_t i = 0; i < y.size(); ++i) {
      const int64_t n = y[i].numel();
      layers.push_back(
          {args.state("y", i, n), args.rows("X", i, n), args.input("s", i, n),
           args.number("lam", i)});
    }
    hessian_action(layers);
  });
}

}  // namespace

Functions factor_ema_ops() {
  return {{"factor_ema_cpu", &factor_ema_cpu}, {"hessian_action_cpu", &hessian_action_cpu}};
}

}  // namespace kbfgs
