// The CUDA half of kbfgs_ext._C: functions <op>_cuda with the arguments of the op of the same name
// (schemas in kbfgs_ext/ops/library.py). As bindings.cpp does for the CPU, it unpacks lists of tensors
// to pointers and checks what the kernels rely on; whatever they do not take raises Unsupported before
// anything is written. Shapes are checked by the ops' api.py. Nothing here reads from the device.
#include <ATen/ops/mm.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "bfgs_update/bfgs_update_cuda.h"
#include "common/cuda_arguments.h"
#include "double_damping/double_damping_cuda.h"
#include "factor_ema/factor_ema_cuda.h"
#include "kron_precondition/kron_precondition_cuda.h"
#include "lbfgs_two_loop/lbfgs_two_loop_cuda.h"

namespace py = pybind11;

namespace kbfgs::cuda {

namespace {

int side(const Tensor& t, int64_t dimension) { return static_cast<int>(t.size(dimension)); }

void factor_ema_cuda(
    const Tensors& A, const Tensors& a_bar, const Tensors& X, double decay, const Flag& ok) {
  by_dtype(a_bar, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<FactorLayer<T>> layers(X.size());
    int64_t spoiled = 0;
    for (size_t i = 0; i < X.size(); ++i) {
      FactorLayer<T>& l = layers[i];
      l.A = A.empty() ? nullptr : args.state("A", A[i]);
      l.a_bar = args.state("a_bar", a_bar[i]);
      l.X = args.rows("X", X[i], &l.ld);
      l.m = side(X[i], 0), l.d_in = side(X[i], 1), l.n_a = side(a_bar[i], 0);
      spoiled += spoiled_elements(l.n_a);
    }
    const bool* flag = args.flag("ok", ok);
    factor_ema(layers, decay, flag, args.template scratch<int>(spoiled), args.stream());
  });
}

void hessian_action_cuda(
    const Tensors& y, const Tensors& X, const Tensors& s, const Tensors& lam) {
  by_dtype(y, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<ActionLayer<T>> layers(y.size());
    for (size_t i = 0; i < y.size(); ++i) {
      ActionLayer<T>& l = layers[i];
      l.y = args.state("y", y[i]);
      l.X = args.rows("X", X[i], &l.ld);
      l.s = args.input("s", s[i]);
      l.lam = args.scalar("lam", lam[i]);
      l.m = side(X[i], 0), l.d_in = side(X[i], 1), l.n_a = side(s[i], 0);
      l.z = args.scratch(l.m);
    }
    hessian_action(layers, args.stream());
  });
}

void pair_ema_cuda(
    const Tensors& s, const Tensors& y, const Tensors& h_bar, const Tensors& h_bar_next,
    const Tensors& g_bar, const Tensors& g_bar_next, double decay, const Flag& ok) {
  by_dtype(s, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<PairLayer<T>> layers;
    for (size_t i = 0; i < s.size(); ++i)
      layers.push_back(
          {args.state("s", s[i]), args.state("y", y[i]), args.input("h_bar", h_bar[i]),
           args.input("h_bar_next", h_bar_next[i]), args.input("g_bar", g_bar[i]),
           args.input("g_bar_next", g_bar_next[i]), side(s[i], 0)});
    pair_ema(layers, decay, args.flag("ok", ok), args.stream());
  });
}

void double_damping_cuda(
    const Tensors& s, const Tensors& y, const Tensors& Hy, const Tensors& counts, const Tensors& H,
    const Tensors& lam, double mu1, const Flag& ok) {
  by_dtype(s, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<DampingLayer<T>> layers;
    for (size_t i = 0; i < s.size(); ++i)
      layers.push_back(
          {args.state("s", s[i]), args.state("y", y[i]),
           H.empty() ? args.input("Hy", Hy[i]) : args.state("Hy", Hy[i]),
           H.empty() ? nullptr : args.state("H", H[i]), args.integers("counts", counts[i]),
           args.scalar("lam", lam[i]), side(s[i], 0)});
    double_damping(layers, mu1, args.flag("ok", ok), args.stream());
  });
}

void bfgs_update_cuda(
    const Tensors& H, const Tensors& counts, const Tensors& s, const Tensors& y, const Tensors& Hy,
    const Tensors& c, const Flag& ok) {
  by_dtype(H, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<BfgsLayer<T>> layers;
    for (size_t i = 0; i < H.size(); ++i)
      layers.push_back(
          {args.state("H", H[i]), args.input("s", s[i]), args.input("y", y[i]),
           Hy.empty() ? args.scratch(s[i].size(0)) : args.input("Hy", Hy[i]),
           args.input("c", c[i]), args.integers("counts", counts[i]), side(s[i], 0), 0});
    bfgs_update(layers, !Hy.empty(), args.flag("ok", ok), args.stream());
  });
}

void curvature_update_cuda(
    const Tensors& H_a, const Tensors& H_g, const Tensors& s, const Tensors& y,
    const Tensors& counts_a, const Tensors& counts_g, const Tensors& work, const Tensors& A,
    const Tensors& X, const Tensors& a_bar, const Tensors& h_bar, const Tensors& h_bar_next,
    const Tensors& g_bar, const Tensors& g_bar_next, const Tensors& lam_a, const Tensors& lam_g,
    double pair_decay, double mu1, const Flag& ok, const Flag& ok_pair) {
  by_dtype(work, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    if (!H_a.empty() && !H_g.empty() && H_a.size() != H_g.size())
      throw Unsupported("the cuda kernels take as many H_a as H_g, or none of one side");
    std::vector<CurvatureLayer<T>> layers(work.size());
    for (size_t i = 0; i < work.size(); ++i) {
      CurvatureLayer<T>& l = layers[i];
      l.work_a = args.state("work", work[i]);
      if (!H_a.empty()) {
        l.H_a = args.state("H_a", H_a[i]);
        l.a_bar = args.input("a_bar", a_bar[i]);
        l.counts_a = args.integers("counts_a", counts_a[i]);
        l.lam_a = args.scalar("lam_a", lam_a[i]);
        l.n_a = side(H_a[i], 0);
        if (X.empty()) {
          l.A = args.state("A", A[i]);
        } else {
          l.X = args.rows("X", X[i], &l.ld);
          l.m = side(X[i], 0), l.d_in = side(X[i], 1);
          l.z = args.scratch(l.m);
        }
      }
      if (!H_g.empty()) {
        l.H_g = args.state("H_g", H_g[i]);
        l.s = args.state("s", s[i]), l.y = args.state("y", y[i]);
        l.h_bar = args.input("h_bar", h_bar[i]);
        l.h_next = args.input("h_bar_next", h_bar_next[i]);
        l.g_bar = args.input("g_bar", g_bar[i]);
        l.g_next = args.input("g_bar_next", g_bar_next[i]);
        l.counts_g = args.integers("counts_g", counts_g[i]);
        l.lam_g = args.scalar("lam_g", lam_g[i]);
        l.n_g = side(H_g[i], 0);
        l.fresh = args.scratch(fresh_elements(l.n_g));
        l.work_g = l.work_a + 3 * int64_t(l.n_a);
      }
    }
    const bool *first = args.flag("ok", ok), *second = args.flag("ok_pair", ok_pair);
    curvature_update(layers, pair_decay, mu1, first, second, args.stream());
  });
}

void lbfgs_two_loop_cuda(
    const Tensors& out, const Tensors& Q, const Tensors& S, const Tensors& Y, const Tensors& rho,
    const Tensors& pushed) {
  by_dtype(out, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<RingLayer<T>> layers(out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      RingLayer<T>& l = layers[i];
      l.n = side(Q[i], 0);
      l.columns = Q[i].dim() == 2 ? side(Q[i], 1) : 1;
      l.p = side(S[i], 0);
      l.out = args.state("out", out[i]);
      l.ld = l.ld_out = l.columns;
      l.Q = Q[i].dim() == 2 ? args.rows("Q", Q[i], &l.ld) : args.input("Q", Q[i]);
      l.S = args.input("S", S[i]), l.Y = args.input("Y", Y[i]);
      l.rho = args.input("rho", rho[i]);
      l.pushed = args.integers("pushed", pushed[i]);
      if (!two_loop_fits(l.n, l.columns, l.p, sizeof(T)))
        throw Unsupported("the recursion's kernel holds columns of up to 8192 and their memory");
    }
    two_loop(layers, args.stream());
  });
}

void lbfgs_push_cuda(
    const Tensors& S, const Tensors& Y, const Tensors& rho, const Tensors& pushed,
    const Tensors& counts, const Tensors& s, const Tensors& y, const Tensors& c, const Flag& ok) {
  by_dtype(S, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<PushLayer<T>> layers;
    for (size_t i = 0; i < S.size(); ++i)
      layers.push_back(
          {args.state("S", S[i]), args.state("Y", Y[i]), args.state("rho", rho[i]),
           args.integers("pushed", pushed[i]), args.integers("counts", counts[i]),
           args.input("s", s[i]), args.input("y", y[i]), args.input("c", c[i]), side(S[i], 1),
           side(S[i], 0)});
    push(layers, args.flag("ok", ok), args.stream());
  });
}

// [W, b] of a layer beside `joined` (M, P or what was saved); dW, db where `gradients` are given.
template <typename T>
ParameterLayer<T> parameters(
    Arguments<T>& args, size_t i, T* joined, const Tensors& W, const Tensors& b,
    const Tensors* dW = nullptr, const Tensors* db = nullptr) {
  const bool bias = b[i].numel() > 0;
  ParameterLayer<T> l{};
  l.joined = joined;
  l.W = args.state("W", W[i]);
  l.b = bias ? args.state("b", b[i]) : nullptr;
  if (dW) l.dW = args.input("dW", (*dW)[i]);
  if (db && bias) l.db = args.input("db", (*db)[i]);
  l.n_g = side(W[i], 0), l.d_in = side(W[i], 1), l.n_a = l.d_in + bias;
  return l;
}

void momentum_cuda(
    const Tensors& M, const Tensors& dW, const Tensors& db, const Tensors& W, const Tensors& b,
    double mu, double weight_decay, const Flag& ok) {
  by_dtype(M, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<ParameterLayer<T>> layers;
    for (size_t i = 0; i < M.size(); ++i)
      layers.push_back(parameters<T>(args, i, args.state("M", M[i]), W, b, &dW, &db));
    momentum(layers, mu, weight_decay, args.flag("ok", ok), args.stream());
  });
}

void descend_cuda(
    const Tensors& W, const Tensors& b, const Tensors& P, const Tensors& step_size,
    const Flag& ok) {
  by_dtype(P, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<ParameterLayer<T>> layers;
    for (size_t i = 0; i < P.size(); ++i) {
      layers.push_back(parameters<T>(args, i, args.state("P", P[i]), W, b));
      layers.back().step_size = args.scalar("step_size", step_size[i]);
    }
    descend(layers, args.flag("ok", ok), args.stream());
  });
}

void restore_cuda(const Tensors& W, const Tensors& b, const Tensors& saved, const Tensor& undo) {
  by_dtype(saved, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    std::vector<ParameterLayer<T>> layers;
    for (size_t i = 0; i < saved.size(); ++i)
      layers.push_back(parameters<T>(args, i, args.input("saved", saved[i]), W, b));
    restore(layers, args.flag("undo", undo), args.stream());
  });
}

// The layers of one call of (3): the small ones for small_step, the others for cuBLAS.
template <typename T>
struct Directions {
  std::vector<SmallLayer<T>> small;
  std::vector<size_t> large;
};

template <typename T>
Directions<T> directions(
    Arguments<T>& args, const Tensors& P, const Tensors& H_g, const Tensors& M, const Tensors& H_a,
    const Tensors& work) {
  Directions<T> out;
  for (size_t i = 0; i < P.size(); ++i) {
    const int n_g = side(M[i], 0), n_a = side(M[i], 1);
    T *p = args.state("P", P[i]), *m = args.state("M", M[i]), *a = args.state("H_a", H_a[i]);
    T* g = H_g.empty() ? nullptr : args.state("H_g", H_g[i]);
    args.state("work", work[i]);
    if (small_step_fits(n_g, n_a, sizeof(T)))
      out.small.push_back({p, g, m, a, nullptr, nullptr, nullptr, n_g, n_a, n_a, 0});
    else
      out.large.push_back(i);
  }
  return out;
}

// cuBLAS, in the precision that torch.backends.cuda.matmul is set to; fp32 unless the user asked.
void multiply_large(
    const std::vector<size_t>& large, const Tensors& P, const Tensors& H_g, const Tensors& M,
    const Tensors& H_a, const Tensors& work) {
  for (const size_t i : large) {
    Tensor p = P[i], left = work[i];
    if (H_g.empty()) {
      at::mm_out(p, M[i], H_a[i]);
    } else {
      at::mm_out(left, H_g[i], M[i]);
      at::mm_out(p, left, H_a[i]);
    }
  }
}

void kron_precondition_cuda(
    const Tensors& P, const Tensors& H_g, const Tensors& M, const Tensors& H_a,
    const Tensors& work) {
  by_dtype(P, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    const Directions<T> split = directions(args, P, H_g, M, H_a, work);
    small_step(split.small, nullptr, args.stream());
    multiply_large(split.large, P, H_g, M, H_a, work);
  });
}

// A small layer's step is part of its direction's launch; the large ones' follows in one launch.
void kron_step_cuda(
    const Tensors& W, const Tensors& b, const Tensors& M, const Tensors& P, const Tensors& work,
    const Tensors& dW, const Tensors& db, const Tensors& H_g, const Tensors& H_a,
    const Tensors& step_size, double mu, double weight_decay, const Flag& ok) {
  by_dtype(M, [&](auto zero, const Tensor& lead) {
    using T = decltype(zero);
    Arguments<T> args(lead);
    Directions<T> split = directions(args, P, H_g, M, H_a, work);
    std::vector<ParameterLayer<T>> averages, steps;
    size_t small = 0, large = 0;
    for (size_t i = 0; i < M.size(); ++i) {
      averages.push_back(parameters<T>(args, i, args.state("M", M[i]), W, b, &dW, &db));
      ParameterLayer<T> l = averages.back();
      l.step_size = args.scalar("step_size", step_size[i]);
      if (large < split.large.size() && split.large[large] == i) {
        l.joined = args.state("P", P[i]);
        steps.push_back(l);
        ++large;
      } else {
        SmallLayer<T>& layer = split.small[small++];
        layer.W = l.W, layer.b = l.b, layer.d_in = l.d_in, layer.step_size = l.step_size;
      }
    }
    const bool* flag = args.flag("ok", ok);
    momentum(averages, mu, weight_decay, flag, args.stream());
    small_step(split.small, flag, args.stream());
    multiply_large(split.large, P, H_g, M, H_a, work);
    descend(steps, flag, args.stream());
  });
}

}  // namespace

}  // namespace kbfgs::cuda

void register_cuda(py::module_& module) {
  using namespace kbfgs::cuda;
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Unsupported& reason) {
      const py::object type = py::module_::import("kbfgs_ext.ops.registry").attr("Unsupported");
      PyErr_SetString(type.ptr(), reason.what());
    }
  });
  const auto def = [&](const char* name, auto function) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  def("factor_ema_cuda", &factor_ema_cuda);
  def("hessian_action_cuda", &hessian_action_cuda);
  def("pair_ema_cuda", &pair_ema_cuda);
  def("double_damping_cuda", &double_damping_cuda);
  def("bfgs_update_cuda", &bfgs_update_cuda);
  def("curvature_update_cuda", &curvature_update_cuda);
  def("lbfgs_two_loop_cuda", &lbfgs_two_loop_cuda);
  def("lbfgs_push_cuda", &lbfgs_push_cuda);
  def("kron_precondition_cuda", &kron_precondition_cuda);
  def("momentum_cuda", &momentum_cuda);
  def("descend_cuda", &descend_cuda);
  def("restore_cuda", &restore_cuda);
  def("kron_step_cuda", &kron_step_cuda);
  module.def("two_loop_fits", &two_loop_fits);
}
