// kbfgs_ext._C: the CPU kernels, called with the arguments of the op of the same name (schemas in
// kbfgs_ext/ops/library.py): lists of tensors unpacked to pointers (common/arguments.h).
// Those of kron_precondition are in its folder.
// Whatever the kernels do not take raises Unsupported, always before anything is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bfgs_update/bfgs_update.h"
#include "bfgs_update/restart_arguments.h"
#include "common/cpu_arguments.h"
#include "common/isa.h"
#include "double_damping/double_damping.h"
#include "factor_ema/factor_ema.h"
#include "lbfgs_two_loop/lbfgs_two_loop.h"
#include "safeguard/safeguard_arguments.h"

namespace py = pybind11;

void register_kron_precondition(py::module_& module);  // kron_precondition/bindings_cpu.cpp
#ifdef KBFGS_WITH_CUDA
void register_cuda(py::module_& module);  // bindings_cuda.cpp
#endif

namespace kbfgs {

namespace {

void factor_ema_cpu(
    const Tensors& A, const Tensors& a_bar, const Tensors& X, double decay, const Flag& ok) {
  by_dtype("cpu", a_bar, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args;
    std::vector<FactorEma<T>> layers;
    for (size_t i = 0; i < a_bar.size(); ++i) {
      const int64_t n = a_bar[i].numel();
      layers.push_back(
          {A.empty() ? nullptr : args.state("A", A, i, n * n), args.state("a_bar", a_bar, i, n),
           args.rows("X", X, i, n)});
    }
    factor_ema(layers, decay, args.read("ok", ok));
  });
}

void hessian_action_cpu(
    const Tensors& y, const Tensors& X, const Tensors& s, const Tensors& lam) {
  by_dtype("cpu", y, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args;
    std::vector<HessianAction<T>> layers;
    for (size_t i = 0; i < y.size(); ++i) {
      const int64_t n = y[i].numel();
      layers.push_back(
          {args.state("y", y, i, n), args.rows("X", X, i, n), args.input("s", s, i, n),
           args.number("lam", lam, i)});
    }
    hessian_action(layers);
  });
}

template <typename T>
PairEma<T> pair_of(
    CpuArguments<T>& args, size_t i, const Tensors& s, const Tensors& y, const Tensors& h_bar,
    const Tensors& h_bar_next, const Tensors& g_bar, const Tensors& g_bar_next) {
  const int64_t n = s[i].numel();
  return {n, args.state("s", s, i, n), args.state("y", y, i, n), args.input("h_bar", h_bar, i, n),
          args.input("h_bar_next", h_bar_next, i, n), args.input("g_bar", g_bar, i, n),
          args.input("g_bar_next", g_bar_next, i, n)};
}

void pair_ema_cpu(
    const Tensors& s, const Tensors& y, const Tensors& h_bar, const Tensors& h_bar_next,
    const Tensors& g_bar, const Tensors& g_bar_next, double decay, const Flag& ok) {
  by_dtype("cpu", s, [&](auto zero) {
    CpuArguments<decltype(zero)> args;
    std::vector<PairEma<decltype(zero)>> layers;
    for (size_t i = 0; i < s.size(); ++i)
      layers.push_back(pair_of(args, i, s, y, h_bar, h_bar_next, g_bar, g_bar_next));
    if (args.read("ok", ok)) pair_ema(layers, decay);
  });
}

void double_damping_cpu(
    const Tensors& s, const Tensors& y, const Tensors& Hy, const Tensors& counts, const Tensors& H,
    const Tensors& lam, double mu1, const Flag& ok) {
  by_dtype("cpu", s, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args;
    std::vector<DoubleDamping<T>> layers;
    for (size_t i = 0; i < s.size(); ++i) {
      const int64_t n = s[i].numel();
      layers.push_back(
          {n, args.state("s", s, i, n), args.state("y", y, i, n),
           H.empty() ? args.input("Hy", Hy, i, n) : args.state("Hy", Hy, i, n),
           H.empty() ? nullptr : args.state("H", H, i, n * n),
           args.integers("counts", counts, i, 4), args.number("lam", lam, i)});
    }
    double_damping(layers, mu1, args.read("ok", ok));
  });
}

void bfgs_update_cpu(
    const Tensors& H, const Tensors& counts, const Tensors& s, const Tensors& y, const Tensors& Hy,
    const Tensors& c, const Flag& ok) {
  by_dtype("cpu", H, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args;
    std::vector<BfgsUpdate<T>> layers;
    for (size_t i = 0; i < H.size(); ++i) {
      const int64_t n = s.at(i).numel();
      layers.push_back(
          {n, args.state("H", H, i, n * n), args.input("s", s, i, n), args.input("y", y, i, n),
           Hy.empty() ? args.scratch(n) : args.input("Hy", Hy, i, n), args.scratch(n),
           args.input("c", c, i, n), args.integers("counts", counts, i, 4)});
    }
    if (args.read("ok", ok)) bfgs_update(layers, !Hy.empty());
  });
}

void curvature_update_cpu(
    const Tensors& H_a, const Tensors& H_g, const Tensors& s, const Tensors& y,
    const Tensors& counts_a, const Tensors& counts_g, const Tensors& work, const Tensors& A,
    const Tensors& X, const Tensors& a_bar, const Tensors& h_bar, const Tensors& h_bar_next,
    const Tensors& g_bar, const Tensors& g_bar_next, const Tensors& lam_a, const Tensors& lam_g,
    double pair_decay, double mu1, const Flag& ok, const Flag& ok_pair) {
  by_dtype("cpu", work, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args;
    std::vector<CurvatureA<T>> a_side;
    std::vector<CurvatureG<T>> g_side;
    for (size_t i = 0; i < work.size(); ++i) {
      const int64_t n_a = H_a.empty() ? 0 : a_bar.at(i).numel();
      const int64_t n_g = H_g.empty() ? 0 : s.at(i).numel();
      if (work[i].numel() < 3 * (n_a + n_g)) throw std::invalid_argument("work is too small");
      T *s_a = args.state("work", work, i, work[i].numel()), *y_a = s_a + n_a, *Hy_a = y_a + n_a;
      T *s_g = Hy_a + n_a, *y_g = s_g + n_g, *Hy_g = y_g + n_g;
      if (!H_a.empty()) {
        const double lam = args.number("lam_a", lam_a, i);
        CurvatureA<T> a{
            {n_a, args.state("H_a", H_a, i, n_a * n_a), s_a, y_a, Hy_a, y_a,
             args.input("a_bar", a_bar, i, n_a), args.integers("counts_a", counts_a, i, 4)},
            nullptr, {}, s_a, y_a, lam};
        if (A.empty())
          a.action = {y_a, args.rows("X", X, i, n_a), s_a, lam};
        else
          a.A = args.state("A", A, i, n_a * n_a);
        a_side.push_back(a);
      }
      if (!H_g.empty()) {
        T* H = args.state("H_g", H_g, i, n_g * n_g);
        int64_t* counts = args.integers("counts_g", counts_g, i, 4);
        const PairEma<T> pair = pair_of(args, i, s, y, h_bar, h_bar_next, g_bar, g_bar_next);
        const double lam = args.number("lam_g", lam_g, i);
        g_side.push_back(
            {{n_g, H, s_g, y_g, Hy_g, y_g, pair.g_bar, counts},
             pair, {n_g, s_g, y_g, Hy_g, H, counts, lam}});
      }
    }
    curvature_update(
        a_side, g_side, pair_decay, mu1, args.read("ok", ok), args.read("ok_pair", ok_pair));
  });
}

void restart_cpu(
    const Tensors& H, const Tensors& pushed, const Tensors& marks, const Tensors& counts,
    const Tensors& lam, const Tensors& A, const Tensors& X, int64_t after, const Flag& force) {
  by_dtype_or_float("cpu", H, marks, [&](auto zero) {
    CpuArguments<decltype(zero)> args;
    const auto layers = restart_layers(args, H, pushed, marks, counts, lam, A, X);
    restart(layers, after, force && args.read("force", force));
  });
}

void lbfgs_two_loop_cpu(
    const Tensors& out, const Tensors& Q, const Tensors& S, const Tensors& Y, const Tensors& rho,
    const Tensors& pushed, const std::string& form) {
  const Form wanted = form == "compact"     ? Form::compact
                      : form == "recursion" ? Form::recursion
                                            : Form::automatic;
  by_dtype("cpu", out, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args;
    std::vector<TwoLoop<T>> layers;
    for (size_t i = 0; i < out.size(); ++i) {
      const Tensor q = Q.at(i).dim() == 2 ? Q[i] : Q[i].unsqueeze(1);
      const int64_t n = q.size(0), p = S.at(i).size(0);
      const Rows<T> rows = args.rows("Q", {q}, 0, q.size(1));
      layers.push_back(
          {{n, p, *args.integers("pushed", pushed, i, 1), args.state("S", S, i, p * n),
            args.state("Y", Y, i, p * n), args.input("rho", rho, i, p)},
           rows.cols, args.state("out", out, i, n * rows.cols), rows.X, rows.stride});
    }
    two_loop(layers, wanted);
  });
}

void lbfgs_push_cpu(
    const Tensors& S, const Tensors& Y, const Tensors& rho, const Tensors& pushed,
    const Tensors& counts, const Tensors& s, const Tensors& y, const Tensors& c, const Flag& ok) {
  by_dtype("cpu", S, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args;
    std::vector<Push<T>> layers;
    for (size_t i = 0; i < S.size(); ++i) {
      const int64_t n = s.at(i).numel(), p = rho.at(i).numel();
      if (p == 0) throw std::invalid_argument("a ring without rows cannot take a pair");
      layers.push_back(
          {n, p, args.state("S", S, i, p * n), args.state("Y", Y, i, p * n),
           args.state("rho", rho, i, p), args.integers("pushed", pushed, i, 1),
           args.integers("counts", counts, i, 4), args.input("s", s, i, n),
           args.input("y", y, i, n), args.input("c", c, i, n)});
    }
    if (args.read("ok", ok)) push(layers);
  });
}

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};  // in the order of Isa

std::vector<std::string> instruction_sets() {
  return {kIsaNames, kIsaNames + static_cast<int>(widest_isa()) + 1};
}

void use_instruction_set(const std::string& name) {
  for (size_t i = 0; i < instruction_sets().size(); ++i)
    if (name == kIsaNames[i]) return active_isa().store(static_cast<Isa>(i));
  throw std::invalid_argument("this processor has no instruction set " + name);
}

}  // namespace

}  // namespace kbfgs

PYBIND11_MODULE(_C, module) {
  using namespace kbfgs;
  translate_unsupported();
#define KBFGS_DEF(op) module.def(#op, &op, py::call_guard<py::gil_scoped_release>())
  KBFGS_DEF(factor_ema_cpu);
  KBFGS_DEF(hessian_action_cpu);
  KBFGS_DEF(pair_ema_cpu);
  KBFGS_DEF(double_damping_cpu);
  KBFGS_DEF(bfgs_update_cpu);
  KBFGS_DEF(curvature_update_cpu);
  KBFGS_DEF(restart_cpu);
  KBFGS_DEF(lbfgs_two_loop_cpu);
  KBFGS_DEF(lbfgs_push_cpu);
  KBFGS_DEF(judge_cpu);
#undef KBFGS_DEF
  register_kron_precondition(module);
  module.def("instruction_sets", &instruction_sets);        // that run here; the last is in use
  module.def("use_instruction_set", &use_instruction_set);  // for tests of the others
#ifdef KBFGS_WITH_CUDA
  register_cuda(module);
  module.def("has_cuda", [] { return true; });
#else
  module.def("has_cuda", [] { return false; });
#endif
}
