// kbfgs_ext._C: the CPU kernels, called with the arguments of the op of the same name (schemas in
// kbfgs_ext/ops/library.py). The one file that knows torch and Python: it unpacks lists of tensors to
// pointers and checks what the kernels rely on. Whatever they do not take raises Unsupported, always
// before anything is written; shapes are checked by the ops' api.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bfgs_update/bfgs_update.h"
#include "double_damping/double_damping.h"
#include "factor_ema/factor_ema.h"
#include "kron_precondition/kron_precondition.h"
#include "lbfgs_two_loop/lbfgs_two_loop.h"

namespace py = pybind11;

#ifdef KBFGS_WITH_CUDA
void register_cuda(py::module_& module);  // bindings_cuda.cpp
#endif

namespace kbfgs {

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Flag = std::optional<Tensor>;

struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The tensors of one call as pointers to T; copies of read-only vectors live as long as this.
template <typename T>
class Arguments {
 public:
  // Written, or a matrix: used in place.
  T* state(const char* name, const Tensor& t) const {
    check(name, t, at::CppTypeToScalarType<T>::value);
    if (!t.is_contiguous()) throw Unsupported(std::string(name) + " is not contiguous");
    return t.data_ptr<T>();
  }
  // Read only: made contiguous where it is not.
  T* input(const char* name, const Tensor& t) {
    check(name, t, at::CppTypeToScalarType<T>::value);
    if (t.is_contiguous()) return t.data_ptr<T>();
    copies_.push_back(t.contiguous());
    return copies_.back().template data_ptr<T>();
  }
  // Read only: any row stride, unit column stride.
  Rows<T> rows(const char* name, Tensor t, int64_t n) {
    check(name, t, at::CppTypeToScalarType<T>::value);
    if ((t.stride(1) != 1 && t.size(1) > 1) || t.stride(0) < t.size(1)) {
      t = t.contiguous();
      copies_.push_back(t);
    }
    return {t.data_ptr<T>(), t.size(0), t.size(1), t.stride(0), n};
  }
  int64_t* counts(const char* name, const Tensor& t) const {
    check(name, t, at::kLong);
    if (!t.is_contiguous()) throw Unsupported(std::string(name) + " is not contiguous");
    return t.data_ptr<int64_t>();
  }
  double scalar(const char* name, const Tensor& t) const {
    check(name, t, at::kDouble);
    if (t.numel() != 1) throw Unsupported(std::string(name) + " is not a scalar");
    return *t.data_ptr<double>();
  }
  // Uninitialised, as long as this lives.
  T* scratch(int64_t elements) {
    copies_.push_back(at::empty({elements}, at::CppTypeToScalarType<T>::value));
    return copies_.back().template data_ptr<T>();
  }

 private:
  static void check(const char* name, const Tensor& t, at::ScalarType wanted) {
    if (!t.device().is_cpu())
      throw Unsupported(std::string(name) + " is on " + t.device().str() + ", not on the CPU");
    if (t.scalar_type() != wanted)
      throw Unsupported(
          std::string(name) + " is " + c10::toString(t.scalar_type()) + " where the cpu kernels take " +
          c10::toString(wanted));
  }

  Tensors copies_;
};

bool read(const char* name, const Flag& flag) {
  if (!flag) return true;
  if (flag->scalar_type() != at::kBool || !flag->device().is_cpu() || flag->numel() != 1)
    throw Unsupported(std::string(name) + " is not a bool scalar on the CPU");
  return *flag->data_ptr<bool>();
}

// Calls run(T{}) with the dtype of the op's first list; an empty list has nothing to run.
template <class Run>
void by_dtype(const Tensors& lead, const Run& run) {
  if (lead.empty()) return;
  switch (lead[0].scalar_type()) {
    case at::kFloat:
      return run(float{});
    case at::kDouble:
      return run(double{});
    default:
      throw Unsupported(
          std::string("the cpu kernels take float32 and float64, not ") +
          c10::toString(lead[0].scalar_type()));
  }
}

void factor_ema_cpu(
    const Tensors& A, const Tensors& a_bar, const Tensors& X, double decay, const Flag& ok) {
  by_dtype(a_bar, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> args;
    std::vector<FactorEma<T>> layers;
    for (size_t i = 0; i < X.size(); ++i)
      layers.push_back(
          {A.empty() ? nullptr : args.state("A", A[i]), args.state("a_bar", a_bar[i]),
           args.rows("X", X[i], a_bar[i].size(0))});
    factor_ema(layers, decay, read("ok", ok));
  });
}

void hessian_action_cpu(
    const Tensors& y, const Tensors& X, const Tensors& s, const Tensors& lam) {
  by_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> args;
    std::vector<HessianAction<T>> layers;
    for (size_t i = 0; i < y.size(); ++i)
      layers.push_back(
          {args.state("y", y[i]), args.rows("X", X[i], s[i].size(0)), args.input("s", s[i]),
           args.scalar("lam", lam[i])});
    hessian_action(layers);
  });
}

template <typename T>
PairEma<T> pair_of(
    Arguments<T>& args, size_t i, const Tensors& s, const Tensors& y, const Tensors& h_bar,
    const Tensors& h_bar_next, const Tensors& g_bar, const Tensors& g_bar_next) {
  return {s[i].size(0), args.state("s", s[i]), args.state("y", y[i]),
          args.input("h_bar", h_bar[i]), args.input("h_bar_next", h_bar_next[i]),
          args.input("g_bar", g_bar[i]), args.input("g_bar_next", g_bar_next[i])};
}

void pair_ema_cpu(
    const Tensors& s, const Tensors& y, const Tensors& h_bar, const Tensors& h_bar_next,
    const Tensors& g_bar, const Tensors& g_bar_next, double decay, const Flag& ok) {
  by_dtype(s, [&](auto zero) {
    Arguments<decltype(zero)> args;
    std::vector<PairEma<decltype(zero)>> layers;
    for (size_t i = 0; i < s.size(); ++i)
      layers.push_back(pair_of(args, i, s, y, h_bar, h_bar_next, g_bar, g_bar_next));
    if (read("ok", ok)) pair_ema(layers, decay);
  });
}

void double_damping_cpu(
    const Tensors& s, const Tensors& y, const Tensors& Hy, const Tensors& counts, const Tensors& H,
    const Tensors& lam, double mu1, const Flag& ok) {
  by_dtype(s, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> args;
    std::vector<DoubleDamping<T>> layers;
    for (size_t i = 0; i < s.size(); ++i)
      layers.push_back(
          {s[i].size(0), args.state("s", s[i]), args.state("y", y[i]),
           H.empty() ? args.input("Hy", Hy[i]) : args.state("Hy", Hy[i]),
           H.empty() ? nullptr : args.state("H", H[i]), args.counts("counts", counts[i]),
           args.scalar("lam", lam[i])});
    double_damping(layers, mu1, read("ok", ok));
  });
}

void bfgs_update_cpu(
    const Tensors& H, const Tensors& counts, const Tensors& s, const Tensors& y, const Tensors& Hy,
    const Tensors& c, const Flag& ok) {
  by_dtype(H, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> args;
    std::vector<BfgsUpdate<T>> layers;
    for (size_t i = 0; i < H.size(); ++i)
      layers.push_back(
          {s[i].size(0), args.state("H", H[i]), args.input("s", s[i]), args.input("y", y[i]),
           Hy.empty() ? args.scratch(s[i].size(0)) : args.input("Hy", Hy[i]),
           args.scratch(s[i].size(0)), args.input("c", c[i]), args.counts("counts", counts[i])});
    if (read("ok", ok)) bfgs_update(layers, !Hy.empty());
  });
}

void curvature_update_cpu(
    const Tensors& H_a, const Tensors& H_g, const Tensors& s, const Tensors& y,
    const Tensors& counts_a, const Tensors& counts_g, const Tensors& work, const Tensors& A,
    const Tensors& X, const Tensors& a_bar, const Tensors& h_bar, const Tensors& h_bar_next,
    const Tensors& g_bar, const Tensors& g_bar_next, const Tensors& lam_a, const Tensors& lam_g,
    double pair_decay, double mu1, const Flag& ok, const Flag& ok_pair) {
  by_dtype(work, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> args;
    std::vector<CurvatureA<T>> a_side;
    std::vector<CurvatureG<T>> g_side;
    for (size_t i = 0; i < H_a.size(); ++i) {
      const int64_t n = a_bar[i].size(0);
      T *v = args.state("work", work[i]), *s_a = v, *y_a = v + n;
      const double lam = args.scalar("lam_a", lam_a[i]);
      CurvatureA<T> a{
          {n, args.state("H_a", H_a[i]), s_a, y_a, v + 2 * n, y_a, args.input("a_bar", a_bar[i]),
           args.counts("counts_a", counts_a[i])},
          nullptr, {}, s_a, y_a, lam};
      if (A.empty())
        a.action = {y_a, args.rows("X", X[i], n), s_a, lam};
      else
        a.A = args.state("A", A[i]);
      a_side.push_back(a);
    }
    for (size_t i = 0; i < H_g.size(); ++i) {
      const int64_t n = s[i].size(0), n_a = H_a.empty() ? 0 : a_bar[i].size(0);
      T *s_g = args.state("work", work[i]) + 3 * n_a, *y_g = s_g + n, *Hy = y_g + n;
      const T* H = args.state("H_g", H_g[i]);
      int64_t* counts = args.counts("counts_g", counts_g[i]);
      const PairEma<T> pair = pair_of(args, i, s, y, h_bar, h_bar_next, g_bar, g_bar_next);
      g_side.push_back(
          {{n, const_cast<T*>(H), s_g, y_g, Hy, y_g, pair.g_bar, counts},
           pair,
           {n, s_g, y_g, Hy, H, counts, args.scalar("lam_g", lam_g[i])}});
    }
    curvature_update(
        a_side, g_side, pair_decay, mu1, read("ok", ok), read("ok_pair", ok_pair));
  });
}

void lbfgs_two_loop_cpu(
    const Tensors& out, const Tensors& Q, const Tensors& S, const Tensors& Y, const Tensors& rho,
    const Tensors& pushed, const std::string& form) {
  const Form wanted = form == "compact"     ? Form::compact
                      : form == "recursion" ? Form::recursion
                                            : Form::automatic;
  by_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> args;
    std::vector<TwoLoop<T>> layers;
    for (size_t i = 0; i < out.size(); ++i) {
      const Ring<T> ring{S[i].size(1), S[i].size(0), *args.counts("pushed", pushed[i]),
                         args.state("S", S[i]), args.state("Y", Y[i]), args.input("rho", rho[i])};
      const Rows<T> q = args.rows("Q", Q[i].dim() == 2 ? Q[i] : Q[i].unsqueeze(1), ring.n);
      layers.push_back({ring, q.cols, args.state("out", out[i]), q.X, q.stride});
    }
    two_loop(layers, wanted);
  });
}

void lbfgs_push_cpu(
    const Tensors& S, const Tensors& Y, const Tensors& rho, const Tensors& pushed,
    const Tensors& counts, const Tensors& s, const Tensors& y, const Tensors& c, const Flag& ok) {
  by_dtype(S, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> args;
    std::vector<Push<T>> layers;
    for (size_t i = 0; i < S.size(); ++i)
      layers.push_back(
          {S[i].size(1), S[i].size(0), args.state("S", S[i]), args.state("Y", Y[i]),
           args.state("rho", rho[i]), args.counts("pushed", pushed[i]),
           args.counts("counts", counts[i]), args.input("s", s[i]), args.input("y", y[i]),
           args.input("c", c[i])});
    if (read("ok", ok)) push(layers);
  });
}

// W and b, or dW and db; an empty b stands for none.
template <typename T>
Parameters<T> parameters(
    Arguments<T>& args, bool written, const char* name, const Tensor& W, const Tensor& b) {
  const auto pointer = [&](const Tensor& t) {
    return written ? args.state(name, t) : args.input(name, t);
  };
  return {W.size(0), W.size(1), pointer(W), b.numel() > 0 ? pointer(b) : nullptr};
}

template <typename T>
Precondition<T> precondition_of(
    Arguments<T>& args, size_t i, const Tensors& P, const Tensors& H_g, const Tensors& M,
    const Tensors& H_a, const Tensors& work) {
  return {M[i].size(0), M[i].size(1), args.state("P", P[i]),
          H_g.empty() ? nullptr : args.state("H_g", H_g[i]), args.state("M", M[i]),
          args.state("H_a", H_a[i]), args.state("work", work[i])};
}

void kron_precondition_cpu(
    const Tensors& P, const Tensors& H_g, const Tensors& M, const Tensors& H_a,
    const Tensors& work) {
  by_dtype(P, [&](auto zero) {
    Arguments<decltype(zero)> args;
    std::vector<Precondition<decltype(zero)>> layers;
    for (size_t i = 0; i < P.size(); ++i)
      layers.push_back(precondition_of(args, i, P, H_g, M, H_a, work));
    precondition(layers);
  });
}

void momentum_cpu(
    const Tensors& M, const Tensors& dW, const Tensors& db, const Tensors& W, const Tensors& b,
    double mu, double weight_decay, const Flag& ok) {
  by_dtype(M, [&](auto zero) {
    Arguments<decltype(zero)> args;
    std::vector<Momentum<decltype(zero)>> layers;
    for (size_t i = 0; i < M.size(); ++i)
      layers.push_back(
          {args.state("M", M[i]), parameters(args, false, "dW or db", dW[i], db[i]),
           parameters(args, false, "W or b", W[i], b[i])});
    if (read("ok", ok)) momentum(layers, mu, weight_decay);
  });
}

void descend_cpu(
    const Tensors& W, const Tensors& b, const Tensors& P, const Tensors& step_size,
    const Flag& ok) {
  by_dtype(P, [&](auto zero) {
    Arguments<decltype(zero)> args;
    std::vector<Descend<decltype(zero)>> layers;
    for (size_t i = 0; i < P.size(); ++i)
      layers.push_back(
          {parameters(args, true, "W or b", W[i], b[i]), args.state("P", P[i]),
           args.scalar("step_size", step_size[i])});
    descend(layers, read("ok", ok));
  });
}

void restore_cpu(const Tensors& W, const Tensors& b, const Tensors& saved, const Tensor& undo) {
  by_dtype(saved, [&](auto zero) {
    Arguments<decltype(zero)> args;
    std::vector<Descend<decltype(zero)>> layers;
    if (!read("undo", undo)) return;
    for (size_t i = 0; i < saved.size(); ++i)
      layers.push_back(
          {parameters(args, true, "W or b", W[i], b[i]), args.input("saved", saved[i]), 0});
    restore(layers);
  });
}

void kron_step_cpu(
    const Tensors& W, const Tensors& b, const Tensors& M, const Tensors& P, const Tensors& work,
    const Tensors& dW, const Tensors& db, const Tensors& H_g, const Tensors& H_a,
    const Tensors& step_size, double mu, double weight_decay, const Flag& ok) {
  by_dtype(M, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> args;
    std::vector<KronStep<T>> layers;
    for (size_t i = 0; i < M.size(); ++i) {
      const Parameters<T> weights = parameters(args, true, "W or b", W[i], b[i]);
      const auto direction = precondition_of(args, i, P, H_g, M, H_a, work);
      layers.push_back(
          {{args.state("M", M[i]), parameters(args, false, "dW or db", dW[i], db[i]), weights},
           direction,
           {weights, direction.P, args.scalar("step_size", step_size[i])}});
    }
    kron_step(layers, mu, weight_decay, read("ok", ok));
  });
}

}  // namespace

}  // namespace kbfgs

PYBIND11_MODULE(_C, module) {
  using namespace kbfgs;
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
  def("factor_ema_cpu", &factor_ema_cpu);
  def("hessian_action_cpu", &hessian_action_cpu);
  def("pair_ema_cpu", &pair_ema_cpu);
  def("double_damping_cpu", &double_damping_cpu);
  def("bfgs_update_cpu", &bfgs_update_cpu);
  def("curvature_update_cpu", &curvature_update_cpu);
  def("lbfgs_two_loop_cpu", &lbfgs_two_loop_cpu);
  def("lbfgs_push_cpu", &lbfgs_push_cpu);
  def("kron_precondition_cpu", &kron_precondition_cpu);
  def("momentum_cpu", &momentum_cpu);
  def("descend_cpu", &descend_cpu);
  def("restore_cpu", &restore_cpu);
  def("kron_step_cpu", &kron_step_cpu);
#ifdef KBFGS_WITH_CUDA
  register_cuda(module);
  module.def("has_cuda", [] { return true; });
#else
  module.def("has_cuda", [] { return false; });
#endif
}
