// kron_precondition's ops on the CPU.
#include "../bindings.h"

#include <vector>

#include "../common/cpu_arguments.h"
#include "kron_precondition.h"
#include "lengths_arguments.h"

namespace kbfgs {

namespace {

// W and b, or dW and db, n_g x n_a together; an empty b stands for none.
template <typename T>
Parameters<T> parameters(
    CpuArguments<T>& args, bool written, const char* W, const char* b, size_t i,
    const Tensor& joined) {
  const bool bias = args.tensor(b, i).numel() > 0;
  const int64_t n_g = joined.size(0), d_in = joined.size(1) - bias;
  const auto pointer = [&](const char* name, int64_t elements) {
    return written ? args.written_numbers(name, i, elements) : args.numbers(name, i, elements);
  };
  return {n_g, d_in, pointer(W, n_g * d_in), bias ? pointer(b, n_g) : Numbers<T>{}};
}

template <typename T>
Parameters<T> weights(CpuArguments<T>& args, bool written, size_t i, const Tensor& joined) {
  return parameters(args, written, "W", "b", i, joined);
}

template <typename T>
Parameters<T> gradient(CpuArguments<T>& args, size_t i, const Tensor& joined) {
  return parameters(args, false, "dW", "db", i, joined);
}

template <typename T>
Precondition<T> precondition_of(CpuArguments<T>& args, size_t i) {
  const Tensor& M = args.tensor("M", i);
  const int64_t n_g = M.size(0), n_a = M.size(1);
  const auto tile = [&](const char* name) { return args.tile(name, i, n_g, n_a); };
  const Strided<T*> P = tile("P"), m = tile("M"), work = tile("work");
  const auto factor = [&](const char* name, int64_t n) {
    return args.given(name) ? args.state(name, i, n * n) : nullptr;
  };
  return {n_g, n_a, P.data, factor("H_g", n_g), m.data, factor("H_a", n_a), work.data,
          P.stride, m.stride, work.stride};
}

void kron_precondition_cpu(const Call& call) {
  const Tensors& M = call.tensors("M");
  by_dtype("cpu", M, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    std::vector<Precondition<decltype(zero)>> layers;
    for (size_t i = 0; i < M.size(); ++i) layers.push_back(precondition_of(args, i));
    precondition(layers);
  });
}

void momentum_cpu(const Call& call) {
  const Tensors& M = call.tensors("M");
  by_dtype("cpu", M, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    std::vector<Momentum<decltype(zero)>> layers;
    for (size_t i = 0; i < M.size(); ++i)
      layers.push_back(
          {args.state("M", i, M[i].numel()), gradient(args, i, M[i]),
           weights(args, false, i, M[i])});
    if (args.read("ok"))
      momentum(layers, call.number("momentum"), call.number("weight_decay"));
  });
}

void descend_cpu(const Call& call) {
  const Tensors& P = call.tensors("P");
  by_dtype("cpu", P, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    std::vector<Descend<decltype(zero)>> layers;
    for (size_t i = 0; i < P.size(); ++i)
      layers.push_back(
          {weights(args, true, i, P[i]), args.state("P", i, P[i].numel()),
           args.number("step_size", i)});
    descend(layers, args.read("ok"));
  });
}

void slope_cpu(const Call& call) {
  const Tensors& saved = call.tensors("saved");
  by_dtype("cpu", saved, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    std::vector<Slope<decltype(zero)>> layers;
    for (size_t i = 0; i < saved.size(); ++i)
      layers.push_back(
          {args.state("slope", i, saved[i].size(0)), weights(args, false, i, saved[i]),
           args.input("saved", i, saved[i].numel()), gradient(args, i, saved[i])});
    slope(layers);
  });
}

void output_change_cpu(const Call& call) {
  const Tensors& saved = call.tensors("saved");
  by_dtype("cpu", saved, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    std::vector<OutputChange<decltype(zero)>> layers;
    for (size_t i = 0; i < saved.size(); ++i) {
      const int64_t n_g = saved[i].size(0), n_a = saved[i].size(1);
      layers.push_back(
          {args.state("change", i, n_g), weights(args, false, i, saved[i]),
           args.input("saved", i, n_g * n_a), args.input("a_bar", i, n_a),
           args.input("a_bar_next", i, n_a)});
    }
    output_change(layers);
  });
}

void restore_cpu(const Call& call) {
  const Tensors& saved = call.tensors("saved");
  by_dtype("cpu", saved, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    std::vector<Descend<decltype(zero)>> layers;
    for (size_t i = 0; i < saved.size(); ++i)
      layers.push_back(
          {weights(args, true, i, saved[i]), args.input("saved", i, saved[i].numel()), 0});
    if (args.read("undo")) restore(layers);
  });
}

void lengths_cpu(const Call& call) {
  const Tensors& norms = call.tensors("norms");
  by_dtype("cpu", norms, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    for (const auto& l : lengths_of<decltype(zero)>(args, norms)) {
      double size = *l.step_size;
      if (call.integer("shared")) {
        double all = 0, rows = 0;
        for (int64_t i = 0; i < l.n; ++i) {
          all += length_of(l.norms[i]) * length_of(l.norms[i]);
          rows += l.roots[i] * l.roots[i];
        }
        size *= std::sqrt(all) / std::sqrt(rows);
      }
      for (int64_t i = 0; i < l.n; ++i) l.sizes[i] = size_of(l, i, size);
    }
  });
}

void kron_step_cpu(const Call& call) {
  const Tensors& M = call.tensors("M");
  by_dtype("cpu", M, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    std::vector<KronStep<T>> layers;
    for (size_t i = 0; i < M.size(); ++i) {
      const Parameters<T> own = weights(args, true, i, M[i]);
      const auto direction = precondition_of(args, i);
      layers.push_back(
          {{args.state("M", i, M[i].numel()), gradient(args, i, M[i]), own},
           direction,
           {own, direction.P, args.number("step_size", i)}});
    }
    kron_step(
        layers, call.number("momentum"), call.number("weight_decay"), args.read("ok"));
  });
}

}  // namespace

Functions kron_precondition_ops() {
  return {
      {"kron_precondition_cpu", &kron_precondition_cpu},
      {"momentum_cpu", &momentum_cpu},
      {"descend_cpu", &descend_cpu},
      {"slope_cpu", &slope_cpu},
      {"output_change_cpu", &output_change_cpu},
      {"restore_cpu", &restore_cpu},
      {"lengths_cpu", &lengths_cpu},
      {"kron_step_cpu", &kron_step_cpu},
  };
}

}  // namespace kbfgs
