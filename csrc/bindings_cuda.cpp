// The CUDA half of kbfgs_ext._C: functions <op>_cuda with the arguments of the op of the same name, as
// bindings.cpp has them for the CPU; those of kron_precondition are in its folder. Nothing here reads
// from the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "bfgs_update/bfgs_update_cuda.h"
#include "bfgs_update/restart_arguments.h"
#include "common/cuda_arguments.h"
#include "double_damping/double_damping_cuda.h"
#include "factor_ema/factor_ema_cuda.h"
#include "lbfgs_two_loop/lbfgs_two_loop_cuda.h"
#include "safeguard/safeguard_arguments.h"
#include "safeguard/safeguard_cuda.h"

namespace py = pybind11;

void register_kron_precondition_cuda(py::module_& module);  // kron_precondition/bindings_cuda.cpp

namespace kbfgs::cuda {

namespace {

// X of a layer: rows, columns, and an implied one of ones where n_a is a column more.
template <typename T, typename Layer>
void set_X(CudaArguments<T>& args, Layer& l, const Tensors& X, size_t i, int64_t n_a) {
  const Strided<T> rows = args.rows("X", X, i, n_a);
  l.X = rows.data, l.ld = rows.stride, l.m = int(rows.m), l.d_in = int(rows.columns);
}

void factor_ema_cuda(
    const Tensors& A, const Tensors& a_bar, const Tensors& X, double decay, const Flag& ok) {
  by_dtype("cuda", a_bar, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(a_bar[0]);
    std::vector<FactorLayer<T>> layers(a_bar.size());
    int64_t spoiled = 0;
    for (size_t i = 0; i < a_bar.size(); ++i) {
      FactorLayer<T>& l = layers[i];
      const int64_t n = a_bar[i].numel();
      l.A = A.empty() ? nullptr : args.state("A", A, i, n * n);
      l.a_bar = args.state("a_bar", a_bar, i, n);
      set_X(args, l, X, i, n);
      l.n_a = int(n);
      spoiled += spoiled_elements(l.n_a);
    }
    const bool* flag = args.flag("ok", ok);
    factor_ema(layers, decay, flag, args.template scratch<int>(spoiled), args.stream());
  });
}

void hessian_action_cuda(
    const Tensors& y, const Tensors& X, const Tensors& s, const Tensors& lam) {
  by_dtype("cuda", y, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(y[0]);
    std::vector<ActionLayer<T>> layers(y.size());
    for (size_t i = 0; i < y.size(); ++i) {
      ActionLayer<T>& l = layers[i];
      const int64_t n = y[i].numel();
      l.y = args.state("y", y, i, n);
      set_X(args, l, X, i, n);
      l.s = args.input("s", s, i, n), l.lam = args.scalar("lam", lam, i);
      l.n_a = int(n), l.z = args.scratch(l.m);
    }
    hessian_action(layers, args.stream());
  });
}

void pair_ema_cuda(
    const Tensors& s, const Tensors& y, const Tensors& h_bar, const Tensors& h_bar_next,
    const Tensors& g_bar, const Tensors& g_bar_next, double decay, const Flag& ok) {
  by_dtype("cuda", s, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(s[0]);
    std::vector<PairLayer<T>> layers;
    for (size_t i = 0; i < s.size(); ++i) {
      const int64_t n = s[i].numel();
      layers.push_back(
          {args.state("s", s, i, n), args.state("y", y, i, n), args.input("h_bar", h_bar, i, n),
           args.input("h_bar_next", h_bar_next, i, n), args.input("g_bar", g_bar, i, n),
           args.input("g_bar_next", g_bar_next, i, n), int(n)});
    }
    pair_ema(layers, decay, args.flag("ok", ok), args.stream());
  });
}

void double_damping_cuda(
    const Tensors& s, const Tensors& y, const Tensors& Hy, const Tensors& counts, const Tensors& H,
    const Tensors& lam, double mu1, const Flag& ok) {
  by_dtype("cuda", s, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(s[0]);
    std::vector<DampingLayer<T>> layers;
    for (size_t i = 0; i < s.size(); ++i) {
      const int64_t n = s[i].numel();
      layers.push_back(
          {args.state("s", s, i, n), args.state("y", y, i, n),
           H.empty() ? args.input("Hy", Hy, i, n) : args.state("Hy", Hy, i, n),
           H.empty() ? nullptr : args.state("H", H, i, n * n),
           args.integers("counts", counts, i, 4), args.scalar("lam", lam, i), int(n)});
    }
    double_damping(layers, mu1, args.flag("ok", ok), args.stream());
  });
}

void bfgs_update_cuda(
    const Tensors& H, const Tensors& counts, const Tensors& s, const Tensors& y, const Tensors& Hy,
    const Tensors& c, const Flag& ok) {
  by_dtype("cuda", H, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(H[0]);
    std::vector<BfgsLayer<T>> layers;
    for (size_t i = 0; i < H.size(); ++i) {
      const int64_t n = s.at(i).numel();
      layers.push_back(
          {args.state("H", H, i, n * n), args.input("s", s, i, n), args.input("y", y, i, n),
           Hy.empty() ? args.scratch(n) : args.input("Hy", Hy, i, n), args.input("c", c, i, n),
           args.integers("counts", counts, i, 4), int(n), 0});
    }
    bfgs_update(layers, !Hy.empty(), args.flag("ok", ok), args.stream());
  });
}

void curvature_update_cuda(
    const Tensors& H_a, const Tensors& H_g, const Tensors& s, const Tensors& y,
    const Tensors& counts_a, const Tensors& counts_g, const Tensors& work, const Tensors& A,
    const Tensors& X, const Tensors& a_bar, const Tensors& h_bar, const Tensors& h_bar_next,
    const Tensors& g_bar, const Tensors& g_bar_next, const Tensors& lam_a, const Tensors& lam_g,
    double pair_decay, double mu1, const Flag& ok, const Flag& ok_pair) {
  by_dtype("cuda", work, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(work[0]);
    if (!H_a.empty() && !H_g.empty() && H_a.size() != H_g.size())
      throw Unsupported("the cuda kernels take as many H_a as H_g, or none of one side");
    std::vector<CurvatureLayer<T>> layers(work.size());
    for (size_t i = 0; i < work.size(); ++i) {
      CurvatureLayer<T>& l = layers[i];
      const int64_t n_a = H_a.empty() ? 0 : a_bar.at(i).numel();
      const int64_t n_g = H_g.empty() ? 0 : s.at(i).numel();
      if (work[i].numel() < 3 * (n_a + n_g)) throw std::invalid_argument("work is too small");
      l.work_a = args.state("work", work, i, work[i].numel());
      if (!H_a.empty()) {
        l.H_a = args.state("H_a", H_a, i, n_a * n_a);
        l.a_bar = args.input("a_bar", a_bar, i, n_a);
        l.counts_a = args.integers("counts_a", counts_a, i, 4);
        l.lam_a = args.scalar("lam_a", lam_a, i);
        l.n_a = int(n_a);
        if (X.empty()) {
          l.A = args.state("A", A, i, n_a * n_a);
        } else {
          set_X(args, l, X, i, n_a);
          l.z = args.scratch(l.m);
        }
      }
      if (!H_g.empty()) {
        l.H_g = args.state("H_g", H_g, i, n_g * n_g);
        l.s = args.state("s", s, i, n_g), l.y = args.state("y", y, i, n_g);
        l.h_bar = args.input("h_bar", h_bar, i, n_g);
        l.h_next = args.input("h_bar_next", h_bar_next, i, n_g);
        l.g_bar = args.input("g_bar", g_bar, i, n_g);
        l.g_next = args.input("g_bar_next", g_bar_next, i, n_g);
        l.counts_g = args.integers("counts_g", counts_g, i, 4);
        l.lam_g = args.scalar("lam_g", lam_g, i);
        l.n_g = int(n_g);
        l.fresh = args.scratch(fresh_elements(n_g));
        l.work_g = l.work_a + 3 * n_a;
      }
    }
    const bool *first = args.flag("ok", ok), *second = args.flag("ok_pair", ok_pair);
    curvature_update(layers, pair_decay, mu1, first, second, args.stream());
  });
}

void restart_cuda(
    const Tensors& H, const Tensors& pushed, const Tensors& marks, const Tensors& counts,
    const Tensors& lam, const Tensors& A, const Tensors& X, int64_t after, const Flag& force) {
  by_dtype_or_float("cuda", H, marks, [&](auto zero) {
    CudaArguments<decltype(zero)> args(marks[0]);
    const auto layers = restart_layers(args, H, pushed, marks, counts, lam, A, X);
    restart(layers, after, args.flag("force", force), args.stream());
  });
}

void lbfgs_two_loop_cuda(
    const Tensors& out, const Tensors& Q, const Tensors& S, const Tensors& Y, const Tensors& rho,
    const Tensors& pushed) {
  by_dtype("cuda", out, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(out[0]);
    std::vector<RingLayer<T>> layers(out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      RingLayer<T>& l = layers[i];
      const Tensor q = Q.at(i).dim() == 2 ? Q[i] : Q[i].unsqueeze(1);
      const Strided<T> rows = args.rows("Q", {q}, 0, q.size(1));
      const int64_t p = S.at(i).size(0), n = rows.m;
      l.Q = rows.data, l.ld = rows.stride, l.n = int(n), l.columns = int(rows.columns);
      l.out = args.state("out", out, i, n * rows.columns);
      l.ld_out = rows.columns;
      l.S = args.input("S", S, i, p * n), l.Y = args.input("Y", Y, i, p * n);
      l.rho = args.input("rho", rho, i, p);
      l.pushed = args.integers("pushed", pushed, i, 1), l.p = int(p);
      if (!two_loop_fits(l.n, l.columns, l.p, sizeof(T)))
        throw Unsupported("the recursion's kernel holds columns of up to 8192 and their memory");
    }
    two_loop(layers, args.stream());
  });
}

void lbfgs_push_cuda(
    const Tensors& S, const Tensors& Y, const Tensors& rho, const Tensors& pushed,
    const Tensors& counts, const Tensors& s, const Tensors& y, const Tensors& c, const Flag& ok) {
  by_dtype("cuda", S, [&](auto zero) {
    using T = decltype(zero);
    CudaArguments<T> args(S[0]);
    std::vector<PushLayer<T>> layers;
    for (size_t i = 0; i < S.size(); ++i) {
      const int64_t n = s.at(i).numel(), p = rho.at(i).numel();
      if (p == 0) throw std::invalid_argument("a ring without rows cannot take a pair");
      layers.push_back(
          {args.state("S", S, i, p * n), args.state("Y", Y, i, p * n),
           args.state("rho", rho, i, p), args.integers("pushed", pushed, i, 1),
           args.integers("counts", counts, i, 4), args.input("s", s, i, n),
           args.input("y", y, i, n), args.input("c", c, i, n), int(n), int(p)});
    }
    push(layers, args.flag("ok", ok), args.stream());
  });
}

void judge_cuda(
    const Tensors& scale, const Tensors& watched, const Tensors& counts, const Tensors& decision,
    const Tensors& loss, const Tensors& loss_next, const Tensors& slope, double noise,
    double shrink, double grow, double sufficient, double smallest, double surge, int64_t window,
    std::optional<int64_t> restart_after, const Flag& ok) {
  by_dtype("cuda", scale, [&](auto zero) {
    CudaArguments<decltype(zero)> args(scale[0]);
    const auto all = judgements(args, scale, watched, counts, decision, loss, loss_next, slope);
    const int64_t after = restart_after.value_or(0);
    const JudgeRule rule{noise, shrink, grow, sufficient, smallest, surge, window, after};
    judge(all, rule, args.flag("ok", ok), args.stream());
  });
}

}  // namespace

}  // namespace kbfgs::cuda

void register_cuda(py::module_& module) {
  using namespace kbfgs::cuda;
  const auto def = [&](const char* name, auto function) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  def("factor_ema_cuda", &factor_ema_cuda);
  def("hessian_action_cuda", &hessian_action_cuda);
  def("pair_ema_cuda", &pair_ema_cuda);
  def("double_damping_cuda", &double_damping_cuda);
  def("bfgs_update_cuda", &bfgs_update_cuda);
  def("curvature_update_cuda", &curvature_update_cuda);
  def("restart_cuda", &restart_cuda);
  def("lbfgs_two_loop_cuda", &lbfgs_two_loop_cuda);
  def("lbfgs_push_cuda", &lbfgs_push_cuda);
  def("judge_cuda", &judge_cuda);
  register_kron_precondition_cuda(module);
  module.def("two_loop_fits", &two_loop_fits);
}
