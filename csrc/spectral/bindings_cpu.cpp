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
    const auto& coefficients = call.numbers("coefficients");
    const double ridge = call.number("ridge");
    if (!call.has("shifts")) return polar(layers, quintics(coefficients), ridge);
    const auto& shifts = call.numbers("shifts");
    if (shifts.empty() || coefficients.size() != shifts.size() + 1 || shifts.size() > kMostInverses)
      throw std::invalid_argument("coefficients and shifts do not fit");
    polar(
        layers, Inverses{coefficients[0], {coefficients.begin() + 1, coefficients.end()}, shifts},
        ridge);
  });
}

}  // namespace

Functions spectral_ops() {
  return {{"polar_cpu", &polar_cpu}};
}

}  // namespace kbfgs
