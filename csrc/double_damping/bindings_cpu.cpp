// double_damping's ops on the CPU.
#include "../bindings.h"

#include <vector>

#include "measure_arguments.h"
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

void measure_inputs_cpu(const Call& call) {
  by_dtype("cpu", call.tensors("norms"), [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    const auto layers = inputs_of<decltype(zero)>(args, call);
    if (!args.read("ok")) return;
    for (const auto& layer : layers) measure_inputs(layer, call.number("share"));
  });
}

void measure_pair_cpu(const Call& call) {
  const Tensors& g_bar = call.tensors("g_bar");
  by_dtype("cpu", g_bar, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    const auto layers = pairs_of<T>(args, g_bar);
    if (!args.read("ok")) return;
    for (const auto& l : layers) {
      double s = 0, y = 0;
      for (int i = 0; i < l.n; ++i) {
        const double h = double(l.h_change[i]), g = double(l.g_next[i] - l.g_bar[i]);
        s += h * h;
        y += g * g;
      }
      *l.ss = followed(*l.ss, s, call.number("share"));
      *l.yy = followed(*l.yy, y, call.number("share"));
      const T by = T(unit(*l.ss, *l.yy));
      for (int i = 0; i < l.n; ++i) {
        l.g_bar[i] *= by;
        l.g_next[i] *= by;
      }
    }
  });
}

}  // namespace

Functions double_damping_ops() {
  return {
      {"pair_ema_cpu", &pair_ema_cpu},
      {"double_damping_cpu", &double_damping_cpu},
      {"measure_inputs_cpu", &measure_inputs_cpu},
      {"measure_pair_cpu", &measure_pair_cpu},
  };
}

}  // namespace kbfgs
