// bfgs_update's ops on the CPU.
#include "../bindings.h"

#include <stdexcept>
#include <vector>

#include "../double_damping/pair_arguments_cpu.h"
#include "bfgs_update.h"
#include "restart_arguments.h"

namespace kbfgs {

namespace {

void bfgs_update_cpu(const Call& call) {
  const Tensors& H = call.tensors("H");
  by_dtype("cpu", H, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    const bool Hy_given = args.given("Hy");
    std::vector<BfgsUpdate<T>> layers;
    for (size_t i = 0; i < H.size(); ++i) {
      const int64_t n = args.tensor("s", i).numel();
      layers.push_back(
          {n, args.state("H", i, n * n), args.input("s", i, n), args.input("y", i, n),
           Hy_given ? args.input("Hy", i, n) : args.scratch(n), args.scratch(n),
           args.input("c", i, n), args.integers("counts", i, 4)});
    }
    if (args.read("ok")) bfgs_update(layers, Hy_given);
  });
}

void curvature_update_cpu(const Call& call) {
  const Tensors& work = call.tensors("work");
  by_dtype("cpu", work, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    const bool a = args.given("H_a"), g = args.given("H_g");
    std::vector<CurvatureA<T>> a_side;
    std::vector<CurvatureG<T>> g_side;
    for (size_t i = 0; i < work.size(); ++i) {
      const int64_t n_a = a ? args.tensor("a_bar", i).numel() : 0;
      const int64_t n_g = g ? args.tensor("s", i).numel() : 0;
      if (work[i].numel() < 3 * (n_a + n_g)) throw std::invalid_argument("work is too small");
      T *s_a = args.state("work", i, work[i].numel()), *y_a = s_a + n_a, *Hy_a = y_a + n_a;
      T *s_g = Hy_a + n_a, *y_g = s_g + n_g, *Hy_g = y_g + n_g;
      if (a) {
        const double lam = args.number("lam_a", i);
        CurvatureA<T> side{
            {n_a, args.state("H_a", i, n_a * n_a), s_a, y_a, Hy_a, y_a,
             args.input("a_bar", i, n_a), args.integers("counts_a", i, 4)},
            nullptr, {}, s_a, y_a, lam};
        if (args.given("A"))
          side.A = args.state("A", i, n_a * n_a);
        else
          side.action = {y_a, args.rows("X", i, n_a), s_a, lam};
        a_side.push_back(side);
      }
      if (g) {
        T* H = args.state("H_g", i, n_g * n_g);
        int64_t* counts = args.integers("counts_g", i, 4);
        const PairEma<T> pair = pair_of(args, i);
        g_side.push_back(
            {{n_g, H, s_g, y_g, Hy_g, y_g, pair.g_bar, counts},
             pair, {n_g, s_g, y_g, Hy_g, H, counts, args.number("lam_g", i)}});
      }
    }
    curvature_update(
        a_side, g_side, call.number("pair_decay"), call.number("mu1"), args.read("ok"),
        args.read("ok_pair"));
  });
}

void restart_cpu(const Call& call) {
  by_dtype_or_float("cpu", call.tensors("H"), call.tensors("marks"), [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    const auto layers = restart_layers(args, call.tensors("marks").size());
    restart(layers, call.integer("after"));
  });
}

}  // namespace

Functions bfgs_update_ops() {
  return {
      {"bfgs_update_cpu", &bfgs_update_cpu},
      {"curvature_update_cpu", &curvature_update_cpu},
      {"restart_cpu", &restart_cpu},
  };
}

}  // namespace kbfgs
