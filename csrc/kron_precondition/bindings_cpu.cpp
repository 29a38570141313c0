// kron_precondition's part of kbfgs_ext._C on the CPU: as bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "../common/cpu_arguments.h"
#include "kron_precondition.h"

namespace py = pybind11;

namespace kbfgs {

namespace {

// W and b, or dW and db, n_g x n_a together; an empty b stands for none.
template <typename T>
Parameters<T> parameters(
    CpuArguments<T>& args, bool written, const char* name, const Tensors& W, const Tensors& b,
    size_t i, const Tensor& joined) {
  const int64_t n_g = joined.size(0), d_in = joined.size(1) - (b.at(i).numel() > 0);
  const auto pointer = [&](const Tensors& list, int64_t elements) {
    return written ? args.state(name, list, i, elements) : args.input(name, list, i, elements);
  };
  return {n_g, d_in, pointer(W, n_g * d_in), b[i].numel() > 0 ? pointer(b, n_g) : nullptr};
}

template <typename T>
Precondition<T> precondition_of(
    CpuArguments<T>& args, size_t i, const Tensors& P, const Tensors& H_g, const Tensors& M,
    const Tensors& H_a, const Tensors& work) {
  const int64_t n_g = M[i].size(0), n_a = M[i].size(1), N = n_g * n_a;
  return {n_g, n_a, args.state("P", P, i, N),
          H_g.empty() ? nullptr : args.state("H_g", H_g, i, n_g * n_g), args.state("M", M, i, N),
          args.state("H_a", H_a, i, n_a * n_a), args.state("work", work, i, N)};
}

void kron_precondition_cpu(
    const Tensors& P, const Tensors& H_g, const Tensors& M, const Tensors& H_a,
    const Tensors& work) {
  by_dtype("cpu", M, [&](auto zero) {
    CpuArguments<decltype(zero)> args;
    std::vector<Precondition<decltype(zero)>> layers;
    for (size_t i = 0; i < M.size(); ++i)
      layers.push_back(precondition_of(args, i, P, H_g, M, H_a, work));
    precondition(layers);
  });
}

void momentum_cpu(
    const Tensors& M, const Tensors& dW, const Tensors& db, const Tensors& W, const Tensors& b,
    double mu, double weight_decay, const Flag& ok) {
  by_dtype("cpu", M, [&](auto zero) {
    CpuArguments<decltype(zero)> args;
    std::vector<Momentum<decltype(zero)>> layers;
    for (size_t i = 0; i < M.size(); ++i)
      layers.push_back(
          {args.state("M", M, i, M[i].numel()),
           parameters(args, false, "dW or db", dW, db, i, M[i]),
           parameters(args, false, "W or b", W, b, i, M[i])});
    if (args.read("ok", ok)) momentum(layers, mu, weight_decay);
  });
}

void descend_cpu(
    const Tensors& W, const Tensors& b, const Tensors& P, const Tensors& step_size,
    const Flag& ok) {
  by_dtype("cpu", P, [&](auto zero) {
    CpuArguments<decltype(zero)> args;
    std::vector<Descend<decltype(zero)>> layers;
    for (size_t i = 0; i < P.size(); ++i)
      layers.push_back(
          {parameters(args, true, "W or b", W, b, i, P[i]), args.state("P", P, i, P[i].numel()),
           args.number("step_size", step_size, i)});
    descend(layers, args.read("ok", ok));
  });
}

void slope_cpu(
    const Tensors& slopes, const Tensors& W, const Tensors& b, const Tensors& saved,
    const Tensors& dW, const Tensors& db) {
  by_dtype("cpu", saved, [&](auto zero) {
    CpuArguments<decltype(zero)> args;
    std::vector<Slope<decltype(zero)>> layers;
    for (size_t i = 0; i < saved.size(); ++i)
      layers.push_back(
          {args.state("slope", slopes, i, saved[i].size(0)),
           parameters(args, false, "W or b", W, b, i, saved[i]),
           args.input("saved", saved, i, saved[i].numel()),
           parameters(args, false, "dW or db", dW, db, i, saved[i])});
    slope(layers);
  });
}

void output_change_cpu(
    const Tensors& change, const Tensors& W, const Tensors& b, const Tensors& saved,
    const Tensors& a_bar, const Tensors& a_bar_next) {
  by_dtype("cpu", saved, [&](auto zero) {
    CpuArguments<decltype(zero)> args;
    std::vector<OutputChange<decltype(zero)>> layers;
    for (size_t i = 0; i < saved.size(); ++i) {
      const int64_t n_g = saved[i].size(0), n_a = saved[i].size(1);
      layers.push_back(
          {args.state("change", change, i, n_g),
           parameters(args, false, "W or b", W, b, i, saved[i]),
           args.input("saved", saved, i, n_g * n_a), args.input("a_bar", a_bar, i, n_a),
           args.input("a_bar_next", a_bar_next, i, n_a)});
    }
    output_change(layers);
  });
}

void restore_cpu(const Tensors& W, const Tensors& b, const Tensors& saved, const Tensor& undo) {
  by_dtype("cpu", saved, [&](auto zero) {
    CpuArguments<decltype(zero)> args;
    std::vector<Descend<decltype(zero)>> layers;
    for (size_t i = 0; i < saved.size(); ++i)
      layers.push_back(
          {parameters(args, true, "W or b", W, b, i, saved[i]),
           args.input("saved", saved, i, saved[i].numel()), 0});
    if (args.read("undo", undo)) restore(layers);
  });
}

void kron_step_cpu(
    const Tensors& W, const Tensors& b, const Tensors& M, const Tensors& P, const Tensors& work,
    const Tensors& dW, const Tensors& db, const Tensors& H_g, const Tensors& H_a,
    const Tensors& step_size, double mu, double weight_decay, const Flag& ok) {
  by_dtype("cpu", M, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args;
    std::vector<KronStep<T>> layers;
    for (size_t i = 0; i < M.size(); ++i) {
      const Parameters<T> weights = parameters(args, true, "W or b", W, b, i, M[i]);
      const auto direction = precondition_of(args, i, P, H_g, M, H_a, work);
      layers.push_back(
          {{args.state("M", M, i, M[i].numel()),
            parameters(args, false, "dW or db", dW, db, i, M[i]), weights},
           direction,
           {weights, direction.P, args.number("step_size", step_size, i)}});
    }
    kron_step(layers, mu, weight_decay, args.read("ok", ok));
  });
}

}  // namespace

}  // namespace kbfgs

void register_kron_precondition(py::module_& module) {
  using namespace kbfgs;
#define KBFGS_DEF(op) module.def(#op, &op, py::call_guard<py::gil_scoped_release>())
  KBFGS_DEF(kron_precondition_cpu);
  KBFGS_DEF(momentum_cpu);
  KBFGS_DEF(descend_cpu);
  KBFGS_DEF(slope_cpu);
  KBFGS_DEF(output_change_cpu);
  KBFGS_DEF(restore_cpu);
  KBFGS_DEF(kron_step_cpu);
#undef KBFGS_DEF
}
