// The tensors of a call of momentum_, descend_, slope_, output_change_, restore_ or kron_step_ as layers.
#pragma once

#include "../common/cuda_arguments.h"
#include "kron_precondition_cuda.h"

namespace kbfgs::cuda {

// [W, b] of every layer beside `joined` (M, P or what was saved); dW, db where they are given.
template <typename T>
std::vector<ParameterLayer<T>> parameters(
    CudaArguments<T>& args, const char* name, bool written, const Tensors& joined,
    const Tensors& W, const Tensors& b, const Tensors* dW = nullptr, const Tensors* db = nullptr) {
  std::vector<ParameterLayer<T>> layers(joined.size());
  for (size_t i = 0; i < joined.size(); ++i) {
    const bool bias = b.at(i).numel() > 0;
    const int64_t n_g = joined[i].size(0), n_a = joined[i].size(1), d_in = n_a - bias;
    const int64_t N = n_g * n_a;
    ParameterLayer<T>& l = layers[i];
    l.joined = written ? args.state(name, joined, i, N) : args.input(name, joined, i, N);
    l.W = args.state("W", W, i, n_g * d_in);
    l.b = bias ? args.state("b", b, i, n_g) : nullptr;
    if (dW) l.dW = args.input("dW", *dW, i, n_g * d_in);
    if (db && bias) l.db = args.input("db", *db, i, n_g);
    l.n_g = int(n_g), l.d_in = int(d_in), l.n_a = int(n_a);
  }
  return layers;
}

}  // namespace kbfgs::cuda
