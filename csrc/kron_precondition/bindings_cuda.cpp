// kron_precondition's part of the CUDA half of kbfgs_ext._C: as ../bindings_cuda.cpp.
#include <ATen/ops/mm.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "../common/cuda_arguments.h"
#include "kron_arguments_cuda.h"
#include "kron_precondition_cuda.h"

namespace py = pybind11;

namespace kbfgs::cuda {

namespace {

void momentum_cuda(
    const Tensors& M, const Tensors& dW, const Tensors& db, const Tensors& W, const Tensors& b,
    double mu, double weight_decay, const Flag& ok) {
  by_dtype("cuda", M, [&](auto zero) {
    CudaArguments<decltype(zero)> args(M[0]);
    const auto layers = parameters(args, "M", true, M, W, b, &dW, &db);
    momentum(layers, mu, weight_decay, args.flag("ok", ok), args.stream());
  });
}

void descend_cuda(
    const Tensors& W, const Tensors& b, const Tensors& P, const Tensors& step_size,
    const Flag& ok) {
  by_dtype("cuda", P, [&](auto zero) {
    CudaArguments<decltype(zero)> args(P[0]);
    auto layers = parameters(args, "P", true, P, W, b);
    for (size_t i = 0; i < P.size(); ++i)
      layers[i].step_size = args.scalar("step_size", step_size, i);
    descend(layers, args.flag("ok", ok), args.stream());
  });
}

void slope_cuda(
    const Tensors& slopes, const Tensors& W, const Tensors& b, const Tensors& saved,
    const Tensors& dW, const Tensors& db) {
  by_dtype("cuda", saved, [&](auto zero) {
    CudaArguments<decltype(zero)> args(saved[0]);
    auto layers = parameters(args, "saved", false, saved, W, b, &dW, &db);
    for (size_t i = 0; i < saved.size(); ++i)
      layers[i].row_sums = args.state("slope", slopes, i, saved[i].size(0));
    slope(layers, args.stream());
  });
}

void output_change_cuda(
    const Tensors& change, const Tensors& W, const Tensors& b, const Tensors& saved,
    const Tensors& a_bar, const Tensors& a_bar_next) {
  by_dtype("cuda", saved, [&](auto zero) {
    CudaArguments<decltype(zero)> args(saved[0]);
    auto layers = parameters(args, "saved", false, saved, W, b);
    for (size_t i = 0; i < saved.size(); ++i) {
      const int64_t n_g = saved[i].size(0), n_a = saved[i].size(1);
      layers[i].row_sums = args.state("change", change, i, n_g);
      layers[i].a_bar = args.input("a_bar", a_bar, i, n_a);
      layers[i].a_bar_next = args.input("a_bar_next", a_bar_next, i, n_a);
    }
    output_change(layers, args.stream());
  });
}

void restore_cuda(const Tensors& W, const Tensors& b, const Tensors& saved, const Tensor& undo) {
  by_dtype("cuda", saved, [&](auto zero) {
    CudaArguments<decltype(zero)> args(saved[0]);
    restore(parameters(args, "saved", false, saved, W, b), args.flag("undo", undo), args.stream());
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
    CudaArguments<T>& args, const Tensors& P, const Tensors& H_g, const Tensors& M,
    const Tensors& H_a, const Tensors& work) {
  Directions<T> out;
  for (size_t i = 0; i < M.size(); ++i) {
    const int64_t n_g = M[i].size(0), n_a = M[i].size(1), N = n_g * n_a;
    T *p = args.state("P", P, i, N), *m = args.state("M", M, i, N);
    T* a = args.state("H_a", H_a, i, n_a * n_a);
    T* g = H_g.empty() ? nullptr : args.state("H_g", H_g, i, n_g * n_g);
    args.state("work", work, i, N);
    if (small_step_fits(n_g, n_a, sizeof(T)))
      out.small.push_back(
          {p, g, m, a, nullptr, nullptr, nullptr, int(n_g), int(n_a), int(n_a), 0});
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
  by_dtype("cuda", M, [&](auto zero) {
    CudaArguments<decltype(zero)> args(M[0]);
    const auto split = directions(args, P, H_g, M, H_a, work);
    small_step(split.small, nullptr, args.stream());
    multiply_large(split.large, P, H_g, M, H_a, work);
  });
}

// A small layer's step is part of its direction's launch; the large ones' follows in one launch.
void kron_step_cuda(
    const Tensors& W, const Tensors& b, const Tensors& M, const Tensors& P, const Tensors& work,
    const Tensors& dW, const Tensors& db, const Tensors& H_g, const Tensors& H_a,
    const Tensors& step_size, double mu, double weight_decay, const Flag& ok) {
  by_dtype("cuda", M, [&](auto zero) {
    CudaArguments<decltype(zero)> args(M[0]);
    auto split = directions(args, P, H_g, M, H_a, work);
    const auto averages = parameters(args, "M", true, M, W, b, &dW, &db);
    std::vector<ParameterLayer<decltype(zero)>> steps;
    size_t small = 0, large = 0;
    for (size_t i = 0; i < M.size(); ++i) {
      auto l = averages[i];
      l.step_size = args.scalar("step_size", step_size, i);
      if (large < split.large.size() && split.large[large] == i) {
        l.joined = args.state("P", P, i, M[i].numel());
        steps.push_back(l), ++large;
      } else {
        auto& layer = split.small[small++];
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

void register_kron_precondition_cuda(py::module_& module) {
  using namespace kbfgs::cuda;
  const auto def = [&](const char* name, auto function) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  def("kron_precondition_cuda", &kron_precondition_cuda);
  def("momentum_cuda", &momentum_cuda);
  def("descend_cuda", &descend_cuda);
  def("slope_cuda", &slope_cuda);
  def("output_change_cuda", &output_change_cuda);
  def("restore_cuda", &restore_cuda);
  def("kron_step_cuda", &kron_step_cuda);
}
