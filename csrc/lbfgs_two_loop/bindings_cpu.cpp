// lbfgs_two_loop's ops on the CPU.
#include "../bindings.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "../common/cpu_arguments.h"
#include "lbfgs_two_loop.h"

namespace kbfgs {

namespace {

void lbfgs_two_loop_cpu(const Call& call) {
  const std::string& form = call.text("form");
  const Form wanted = form == "compact"     ? Form::compact
                      : form == "recursion" ? Form::recursion
                                            : Form::automatic;
  const Tensors& out = call.tensors("out");
  by_dtype("cpu", out, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    std::vector<TwoLoop<T>> layers;
    for (size_t i = 0; i < out.size(); ++i) {
      const Strided<T*> rows = args.columns("Q", i);
      const int64_t n = rows.m, p = args.tensor("S", i).size(0);
      layers.push_back(
          {{n, p, *args.integers("pushed", i, 1), args.state("S", i, p * n),
            args.state("Y", i, p * n), args.input("rho", i, p)},
           rows.columns, args.state("out", i, n * rows.columns), rows.data, rows.stride});
    }
    two_loop(layers, wanted);
  });
}

void lbfgs_push_cpu(const Call& call) {
  const Tensors& S = call.tensors("S");
  by_dtype("cpu", S, [&](auto zero) {
    using T = decltype(zero);
    CpuArguments<T> args(call);
    std::vector<Push<T>> layers;
    for (size_t i = 0; i < S.size(); ++i) {
      const int64_t n = args.tensor("s", i).numel(), p = args.tensor("rho", i).numel();
      if (p == 0) throw std::invalid_argument("a ring without rows cannot take a pair");
      layers.push_back(
          {n, p, args.state("S", i, p * n), args.state("Y", i, p * n), args.state("rho", i, p),
           args.integers("pushed", i, 1), args.integers("counts", i, 4), args.input("s", i, n),
           args.input("y", i, n), args.input("c", i, n)});
    }
    if (args.read("ok")) push(layers);
  });
}

}  // namespace

Functions lbfgs_two_loop_ops() {
  return {{"lbfgs_two_loop_cpu", &lbfgs_two_loop_cpu}, {"lbfgs_push_cpu", &lbfgs_push_cpu}};
}

}  // namespace kbfgs
