// Restarts (12): four counters read and three written per layer; H and tr A are touched only where it
// comes to a restart, which is rare, so that part is plain.
#include <algorithm>
#include <cmath>

#include "bfgs_update.h"

namespace kbfgs {

namespace {

// lam + tr A
template <typename T>
double damped_trace(const Restart<T>& l) {
  double trace = 0;
  if (l.A != nullptr) {
    for (int64_t i = 0; i < l.n; ++i) trace += l.A[i * (l.n + 1)];
    return *l.lam + trace;
  }
  for (int64_t r = 0; r < l.m; ++r) {
    for (int64_t j = 0; j < l.d_in; ++j) {
      const double x = l.X.at(r * l.ld + j);
      trace += x * x;
    }
  }
  return *l.lam + trace / static_cast<double>(l.m) + static_cast<double>(l.n - l.d_in);
}

}  // namespace

template <typename T>
void restart(const std::vector<Restart<T>>& layers, int64_t after) {
  for (const Restart<T>& l : layers) {
    const int64_t accepted = l.counts[kAccepted], rejected = l.counts[kRejected];
    const int64_t begin = accepted > l.marks[0] ? rejected : l.marks[1];
    bool now = rejected - begin >= after || (l.force != nullptr && *l.force);
    const double divisor = now && l.lam != nullptr ? damped_trace(l) : 1;
    now = now && std::isfinite(divisor);
    l.marks[0] = accepted;
    l.marks[1] = now ? rejected : begin;
    l.marks[2] += now;
    if (!now) continue;
    if (l.pushed != nullptr) *l.pushed = 0;
    for (int64_t i = 0; i < l.n; ++i) {
      std::fill(l.H + i * l.n, l.H + (i + 1) * l.n, T{0});
      l.H[i * (l.n + 1)] = static_cast<T>(1 / divisor);
    }
  }
}

template void restart(const std::vector<Restart<float>>&, int64_t);
template void restart(const std::vector<Restart<double>>&, int64_t);

}  // namespace kbfgs
