// A call of momentum_, descend_, slope_, output_change_, restore_ or kron_step_ as layers.
#pragma once

#include <vector>

#include "../common/cuda_arguments.h"
#include "kron_precondition_cuda.h"

namespace kbfgs::cuda {

enum class Joined { kWritten, kRead };
enum class Gradient { kGiven, kNone };

// [W, b] of every layer beside the list `name` (M, P or what was saved); dW, db where they are given.
template <typename T>
std::vector<ParameterLayer<T>> parameters(
    CudaArguments<T>& args, const Tensors& joined, const char* name, Joined use,
    Gradient gradient) {
  std::vector<ParameterLayer<T>> layers(joined.size());
  for (size_t i = 0; i < joined.size(); ++i) {
    const bool bias = args.tensor("b", i).numel() > 0;
    const int64_t n_g = joined[i].size(0), n_a = joined[i].size(1), d_in = n_a - bias;
    const int64_t N = n_g * n_a;
    ParameterLayer<T>& l = layers[i];
    l.joined = use == Joined::kWritten ? args.state(name, i, N) : args.input(name, i, N);
    l.W = l.b = args.written_numbers("W", i, n_g * d_in);
    l.b.data = nullptr;
    if (bias) l.b = args.written_numbers("b", i, n_g);
    if (gradient == Gradient::kGiven) {
      l.dW = args.numbers("dW", i, n_g * d_in);
      l.db = bias ? args.numbers("db", i, n_g) : l.dW;
    }
    if (l.b.format != l.W.format || l.db.format != l.dW.format)
      throw Unsupported("the cuda kernels take b in the dtype of W, and db in that of dW");
    l.n_g = int(n_g), l.d_in = int(d_in), l.n_a = int(n_a);
  }
  return layers;
}

}  // namespace kbfgs::cuda
