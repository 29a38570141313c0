// double_damping's ops on the CPU.
#include "../bindings.h"

#include <vector>

#include "pair_arguments_cpu.h"

namespace kbfgs {

namespace {

void pair_ema_cpu(const Call& call) {
  const Tensors& s = call.tensors("s");
  by_dtype("cpu", s, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    std::vector<PairEma<decltype(zero)>> layers;
    for (size_t i = 0; i < s.size(); ++i) layers.push_back(pair_of(args, i));
    if (args.read("ok")) pair_ema(layers, call.number("decay"));
  });
}

void double_damping_cpu(const Call& call) {
  const Tensors& s = call.tensors("s");
  by_dtype("cpu", s, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    const bool with_H = args.given("H");
    std::vector<DoubleDamping<T>> layers;
    for (size_t i = 0; i < s.size(); ++i) {
      const int64_t n = s[i].numel();
      layers.push_back(
          {n, args.state("s", i, n), args.state("y", i, n),
           with_H ? args.state("Hy", i, n) : args.input("Hy", i, n),
           with_H ? args.state("H", i, n * n) : nullptr, args.integers("counts", i, 4),
           args.number("lam", i)});
    }
    double_damping(layers, call.number("mu1"), args.read("ok"));
  });
}

}  // namespace

Functions double_damping_ops() {
  return {{"pair_ema_cpu", &pair_ema_cpu}, {"double_damping_cpu", &double_damping_cpu}};
}

}  // namespace kbfgs
