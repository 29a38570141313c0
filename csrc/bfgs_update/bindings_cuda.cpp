// bfgs_update's ops on CUDA.
#include "../bindings.h"

#include <stdexcept>
#include <vector>

#include "../factor_ema/rows_cuda.h"
#include "bfgs_update_cuda.h"
#include "restart_arguments.h"

namespace kbfgs::cuda {

namespace {

void bfgs_update_cuda(const Call& call) {
  const Tensors& H = call.tensors("H");
  by_dtype("cuda", H, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, H[0]);
    const bool Hy_given = args.given("Hy");
    std::vector<BfgsLayer<T>> layers;
    for (size_t i = 0; i < H.size(); ++i) {
      const int64_t n = args.tensor("s", i).numel();
      layers.push_back(
          {args.state("H", i, n * n), args.input("s", i, n), args.input("y", i, n),
           Hy_given ? args.input("Hy", i, n) : args.scratch(n), args.input("c", i, n),
           args.integers("counts", i, 4), int(n), 0});
    }
    bfgs_update(layers, Hy_given, args.flag("ok"), args.stream());
  });
}

void curvature_update_cuda(const Call& call) {
  const Tensors& work = call.tensors("work");
  by_dtype("cuda", work, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(call, work[0]);
    const bool a = args.given("H_a"), g = args.given("H_g");
    if (a && g && call.tensors("H_a").size() != call.tensors("H_g").size())
      throw Unsupported("the cuda kernels take as many H_a as H_g, or none of one side");
    std::vector<CurvatureLayer<T>> layers(work.size());
    for (size_t i = 0; i < work.size(); ++i) {
      CurvatureLayer<T>& l = layers[i];
      const int64_t n_a = a ? args.tensor("a_bar", i).numel() : 0;
      const int64_t n_g = g ? args.tensor("s", i).numel() : 0;
      if (work[i].numel() < 3 * (n_a + n_g)) throw std::invalid_argument("work is too small");
      l.work_a = args.state("work", i, work[i].numel());
      if (a) {
        l.H_a = args.state("H_a", i, n_a * n_a);
        l.a_bar = args.input("a_bar", i, n_a);
        l.counts_a = args.integers("counts_a", i, 4);
        l.lam_a = args.scalar("lam_a", i);
        l.n_a = int(n_a);
        if (args.given("X")) {
          set_X(args, l, i, n_a);
          l.z = args.scratch(l.m);
        } else {
          l.A = args.state("A", i, n_a * n_a);
        }
      }
      if (g) {
        l.H_g = args.state("H_g", i, n_g * n_g);
        l.s = args.state("s", i, n_g), l.y = args.state("y", i, n_g);
        l.h_change = args.input("h_change", i, n_g);
        l.g_bar = args.input("g_bar", i, n_g);
        l.g_next = args.input("g_bar_next", i, n_g);
        l.counts_g = args.integers("counts_g", i, 4);
        l.lam_g = args.scalar("lam_g", i);
        l.n_g = int(n_g);
        l.fresh = args.scratch(fresh_elements(n_g));
        l.work_g = l.work_a + 3 * n_a;
      }
    }
    curvature_update(
        layers, call.number("pair_decay"), call.number("mu1"), args.flag("ok"),
        args.flag("ok_pair"), args.stream());
  });
}

void restart_cuda(const Call& call) {
  const Tensors& marks = call.tensors("marks");
  by_dtype_or_float("cuda", call.tensors("H"), marks, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, marks[0]);
    const auto layers = restart_layers(args, marks.size());
    restart(layers, call.integer("after"), args.stream());
  });
}

}  // namespace

Functions bfgs_update_ops() {
  return {
      {"bfgs_update_cuda", &bfgs_update_cuda},
      {"curvature_update_cuda", &curvature_update_cuda},
      {"restart_cuda", &restart_cuda},
  };
}

}  // namespace kbfgs::cuda
