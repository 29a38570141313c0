// The tensors of a call of restart_ as layers.
#pragma once

#include "../common/arguments.h"
#include "restart.h"

namespace kbfgs {

template <typename T>
std::vector<Restart<T>> restart_layers(
    Arguments<T>& args, const Tensors& H, const Tensors& pushed, const Tensors& marks,
    const Tensors& counts, const Tensors& lam, const Tensors& A, const Tensors& X) {
  std::vector<Restart<T>> layers(marks.size());
  for (size_t i = 0; i < marks.size(); ++i) {
    Restart<T>& l = layers[i];
    l.marks = args.integers("marks", marks, i, 3);
    l.counts = args.integers("counts", counts, i, 4);
    if (!pushed.empty()) {
      l.pushed = args.integers("pushed", pushed, i, 1);
      continue;
    }
    l.n = H.at(i).size(0);
    l.H = args.state("H", H, i, l.n * l.n);
    if (lam.empty()) continue;
    l.lam = args.scalar("lam", lam, i);
    if (!A.empty()) {
      l.A = args.state("A", A, i, l.n * l.n);
    } else {
      const Strided<T> rows = args.rows("X", X, i, l.n);
      l.X = rows.data, l.m = rows.m, l.d_in = rows.columns, l.ld = rows.stride;
    }
  }
  return layers;
}

}  // namespace kbfgs
