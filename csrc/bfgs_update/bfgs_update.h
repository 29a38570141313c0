// bfgs_update: gate (8), rank-2 update (9), the whole curvature update of a step, (5) to (10), and
// restarts (12).
// Equations are those of kbfgs_ext/ops/README.md. One entry of a list per layer.
#pragma once

#include <cstdint>
#include <vector>

#include "../double_damping/double_damping.h"
#include "../factor_ema/factor_ema.h"
#include "restart.h"

namespace kbfgs {

template <typename T>
struct BfgsUpdate {
  int64_t n;
  T* H;            // n x n, symmetric, updated
  const T* s;      // n
  const T* y;      // n
  T* Hy;           // n: H y, written or, where the caller has it, only read
  T* w;            // n, scratch; may be y where y is scratch
  const T* c;      // n, reference vector of the gate
  int64_t* counts;
};

template <typename T>
struct Gate {
  bool accept;
  double rho;          // 1/s'y
  double coefficient;  // rho^2*y'Hy + rho
};

// (8). Hy may be null where the caller does not form the update (lbfgs_push).
template <typename T>
Gate<T> gate(int64_t n, const T* s, const T* y, const T* Hy, const T* c);

template <typename T>
void bfgs_update(const std::vector<BfgsUpdate<T>>& layers, bool Hy_given);

// The activation side of a layer: s = H a_bar, y = A s + lam s or X~'(X~ s)/m + lam s (10).
template <typename T>
struct CurvatureA {
  BfgsUpdate<T> update;       // s, y, Hy are scratch; c is a_bar
  const T* A;                 // n x n, symmetric, or null: then `action` gives y
  HessianAction<T> action;    // writes y from s
  T* s;                       // the scratch behind update.s
  T* y;                       // the scratch behind update.y
  double lam;
};

// The gradient side: the averaged pair (5), copies of it damped (6), (7).
template <typename T>
struct CurvatureG {
  BfgsUpdate<T> update;       // s, y, Hy are scratch; c is g_bar
  PairEma<T> pair;
  DoubleDamping<T> damping;   // works on the scratch behind update
};

// `ok` voids the activation side, `ok_pair` the gradient side.
template <typename T>
void curvature_update(
    const std::vector<CurvatureA<T>>& a_side, const std::vector<CurvatureG<T>>& g_side,
    double pair_decay, double mu1, bool ok, bool ok_pair);

// (12) after `after` rejected pairs in a row, or where `force`.
template <typename T>
void restart(const std::vector<Restart<T>>& layers, int64_t after);

}  // namespace kbfgs
