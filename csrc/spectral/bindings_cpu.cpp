// spectral's op on the CPU.
#include "../bindings.h"

#include <stdexcept>
#include <vector>

#include "../common/cpu_arguments.h"
#include "spectral.h"

namespace kbfgs {

namespace {

void polar_cpu(const Call& call) {
  const Tensors& P = call.tensors("P");
  by_dtype("cpu", P, [&](auto zero) {
    CpuArguments<decltype(zero)> args(call);
    std::vector<Polar<decltype(zero)>> layers;
    for (size_t i = 0; i < P.size(); ++i) {
      const int64_t n_g = P[i].size(0), n_a = P[i].size(1);
      const int64_t scratch = args.tensor("work", i).numel();
      if (scratch < polar_workspace(n_g, n_a)) throw std::invalid_argument("work is too small");
      layers.push_back(
          {n_g, n_a, args.state("P", i, n_g * n_a), args.state("work", i, scratch)});
    }
    polar(layers, quintics(call.numbers("coefficients")), call.number("ridge"));
  });
}

}  // namespace

Functions spectral_ops() {
  return {{"polar_cpu", &polar_cpu}};
}

}  // namespace kbfgs
