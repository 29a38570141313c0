// kron_precondition's ops on CUDA.
#include "../bindings.h"

#include <vector>

#include "../common/cuda_arguments.h"
#include "../common/gemm_cuda.h"
#include "kron_arguments_cuda.h"
#include "kron_precondition_cuda.h"
#include "lengths_arguments.h"
#include "panels.h"

namespace kbfgs::cuda {

namespace {

void momentum_cuda(const Call& call) {
  const Tensors& M = call.tensors("M");
  by_dtype("cuda", M, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, M[0]);
    const auto layers = parameters(args, M, "M", Joined::kWritten, Gradient::kGiven);
    const double mu = call.number("momentum"), weight_decay = call.number("weight_decay");
    momentum(layers, mu, weight_decay, args.flag("ok"), args.stream());
  });
}

void descend_cuda(const Call& call) {
  const Tensors& P = call.tensors("P");
  by_dtype("cuda", P, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, P[0]);
    auto layers = parameters(args, P, "P", Joined::kWritten, Gradient::kNone);
    for (size_t i = 0; i < P.size(); ++i) layers[i].step_size = args.scalar("step_size", i);
    descend(layers, args.flag("ok"), args.stream());
  });
}

void slope_cuda(const Call& call) {
  const Tensors& saved = call.tensors("saved");
  by_dtype("cuda", saved, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, saved[0]);
    auto layers = parameters(args, saved, "saved", Joined::kRead, Gradient::kGiven);
    for (size_t i = 0; i < saved.size(); ++i)
      layers[i].row_sums = args.state("slope", i, saved[i].size(0));
    slope(layers, args.stream());
  });
}

void output_change_cuda(const Call& call) {
  const Tensors& saved = call.tensors("saved");
  by_dtype("cuda", saved, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, saved[0]);
    auto layers = parameters(args, saved, "saved", Joined::kRead, Gradient::kNone);
    for (size_t i = 0; i < saved.size(); ++i) {
      const int64_t n_g = saved[i].size(0), n_a = saved[i].size(1);
      layers[i].row_sums = args.state("change", i, n_g);
      layers[i].a_bar = args.input("a_bar", i, n_a);
      layers[i].a_bar_next = args.input("a_bar_next", i, n_a);
    }
    output_change(layers, args.stream());
  });
}

void restore_cuda(const Call& call) {
  const Tensors& saved = call.tensors("saved");
  by_dtype("cuda", saved, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, saved[0]);
    const auto layers = parameters(args, saved, "saved", Joined::kRead, Gradient::kNone);
    restore(layers, args.flag("undo"), args.stream());
  });
}

void lengths_cuda(const Call& call) {
  const Tensors& norms = call.tensors("norms");
  by_dtype("cuda", norms, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, norms[0]);
    const auto entries = lengths_of<decltype(zero)>(args, norms);
    lengths(entries, call.integer("shared") != 0, args.stream());
  });
}

// The layers of one call of (3): the small ones for small_step, the others for cuBLAS.
template <typename T>
struct Directions {
  std::vector<SmallLayer<T>> small;
  std::vector<Precondition<T>> large;
  std::vector<bool> is_small;  // of the call's layers
};

template <typename T>
Directions<T> directions(CudaArguments<T>& args, const Tensors& M) {
  Directions<T> out;
  for (size_t i = 0; i < M.size(); ++i) {
    const int64_t n_g = M[i].size(0), n_a = M[i].size(1);
    const Strided<T*> p = args.tile("P", i, n_g, n_a), m = args.tile("M", i, n_g, n_a);
    const auto factor = [&](const char* name, int64_t n) {
      return args.given(name) ? args.state(name, i, n * n) : nullptr;
    };
    T *g = factor("H_g", n_g), *a = factor("H_a", n_a);
    const Strided<T*> work = args.tile("work", i, n_g, n_a);
    const bool whole = p.stride == n_a && m.stride == n_a;  // not a tile of larger matrices
    out.is_small.push_back(whole && small_step_fits(n_g, n_a, sizeof(T)));
    if (out.is_small.back())
      out.small.push_back(
          {p.data, g, m.data, a, {}, {}, nullptr, int(n_g), int(n_a), int(n_a), 0});
    else
      out.large.push_back(
          {n_g, n_a, p.data, g, m.data, a, work.data, p.stride, m.stride, work.stride});
  }
  return out;
}

template <typename T>
void multiply_large(const std::vector<Precondition<T>>& large, Device device) {
  const auto view = [&](const T* data, int64_t rows, int64_t columns, int64_t stride) {
    return torch_view<T>({data, rows, columns, stride}, device);
  };
  for (const auto& l : side_by_side(large))
    if (l.H_g != nullptr)
      multiply(
          view(l.product(), l.n_g, l.n_a, l.ld_product()), view(l.H_g, l.n_g, l.n_g, l.n_g),
          view(l.M, l.n_g, l.n_a, l.ld_M));
  for (const auto& l : one_below_the_other(large))
    if (l.H_a != nullptr)
      multiply(
          view(l.P, l.n_g, l.n_a, l.ld_P), view(l.left(), l.n_g, l.n_a, l.ld_left()),
          view(l.H_a, l.n_a, l.n_a, l.n_a));
}

void kron_precondition_cuda(const Call& call) {
  const Tensors& M = call.tensors("M");
  by_dtype("cuda", M, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, M[0]);
    const auto split = directions(args, M);
    small_step(split.small, nullptr, args.stream());
    multiply_large(split.large, M[0].device());
  });
}

// A small layer's step is part of its direction's launch; the large ones' follows in one launch.
void kron_step_cuda(const Call& call) {
  const Tensors& M = call.tensors("M");
  by_dtype("cuda", M, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, M[0]);
    auto split = directions(args, M);
    const auto averages = parameters(args, M, "M", Joined::kWritten, Gradient::kGiven);
    std::vector<ParameterLayer<decltype(zero)>> steps;
    size_t small = 0;
    for (size_t i = 0; i < M.size(); ++i) {
      auto l = averages[i];
      l.step_size = args.scalar("step_size", i);
      if (!split.is_small[i]) {
        l.joined = args.state("P", i, M[i].numel());
        steps.push_back(l);
      } else {
        auto& layer = split.small[small++];
        layer.W = l.W, layer.b = l.b, layer.d_in = l.d_in, layer.step_size = l.step_size;
      }
    }
    const double mu = call.number("momentum"), weight_decay = call.number("weight_decay");
    const bool* flag = args.flag("ok");
    momentum(averages, mu, weight_decay, flag, args.stream());
    small_step(split.small, flag, args.stream());
    multiply_large(split.large, M[0].device());
    descend(steps, flag, args.stream());
  });
}

}  // namespace

Functions kron_precondition_ops() {
  return {
      {"kron_precondition_cuda", &kron_precondition_cuda},
      {"momentum_cuda", &momentum_cuda},
      {"descend_cuda", &descend_cuda},
      {"slope_cuda", &slope_cuda},
      {"output_change_cuda", &output_change_cuda},
      {"restore_cuda", &restore_cuda},
      {"lengths_cuda", &lengths_cuda},
      {"kron_step_cuda", &kron_step_cuda},
  };
}

}  // namespace kbfgs::cuda
