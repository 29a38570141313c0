// What a step begins with (20) and the safeguard's judgement of it (14), the same code on the CPU and on
// a GPU: some fifty operations on scalars, in double. Equations are those of kbfgs_ext/ops/README.md.
#pragma once

#include <cstdint>
#include <limits>

#include "../common/host_device.h"

namespace kbfgs {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Words of `decision`.
enum Decision { kUndo, kOrderG, kWaiting, kSoundPair, kOrderA, kDecisions };

template <typename T>
struct Admission {
  bool* sound;      // scalar
  int64_t* counts;  // 4: steps, skipped, undone, restarts
  bool* decision;   // of these words
  const T* loss;
  const T* norms;
  int64_t n;  // of norms
};

// The order that waits, where it is `take`n now.
KBFGS_HOST_DEVICE inline void take_order(bool* decision, bool take, bool ok) {
  decision[kOrderA] = take && ok && decision[kWaiting];
  if (decision[kOrderA]) decision[kWaiting] = false;
}

// (20), with `bad` norms that are not finite.
template <typename T>
KBFGS_HOST_DEVICE inline void admit(const Admission<T>& a, bool bad, bool take) {
  const bool sound = !bad && is_finite(*a.loss);
  *a.sound = sound;
  a.counts[0] += 1;
  a.counts[1] += !sound;
  take_order(a.decision, take, sound);
}

template <typename T>
struct Judge {
  T* scale;         // scalar
  T* watched;       // 4: stuck, seen, mean, lowest
  int64_t* counts;  // 4: steps, skipped, undone, restarts
  bool* decision;
  const T *loss, *loss_next;
  const T* slope;  // null: any decrease is enough
};

struct JudgeRule {
  double noise, shrink, grow, sufficient, smallest, surge;
  int64_t window;
  int64_t after;  // 0: no restart is ordered
  bool take;      // the activation sides' order now
};

// Comparisons are written so that a NaN decides as it does in the reference.
template <typename T>
KBFGS_HOST_DEVICE inline void judge(const Judge<T>& j, const JudgeRule& rule, bool ok) {
  const double before = *j.scale, loss = *j.loss, loss_next = *j.loss_next;
  const double rise = loss_next - loss, room = rule.noise * (loss < 0 ? -loss : loss);
  const bool undo = !is_finite(loss_next) || rise > room;
  bool order = false;
  if (rule.after > 0) {
    const double window = static_cast<double>(rule.window);
    const double stuck = (j.watched[0] + 1.0) * (undo && before <= rule.smallest ? 1.0 : 0.0);
    double seen = j.watched[1] + 1.0, lowest = j.watched[3];
    if (seen > window) seen = window;
    const double mean = j.watched[2] + (loss - j.watched[2]) / seen;
    if (seen == window && (mean < lowest || mean != mean)) lowest = mean;
    const bool surge = mean > rule.surge * lowest && lowest > 0;
    order = ok && (stuck >= static_cast<double>(rule.after) || surge);
    if (ok) {
      j.watched[0] = static_cast<T>(order ? 0 : stuck);
      j.watched[1] = static_cast<T>(order ? 0 : seen);
      j.watched[2] = static_cast<T>(order ? 0 : mean);
      j.watched[3] = static_cast<T>(order ? kInfinity : lowest);
    }
  }
  double scale = before * rule.grow;
  if (j.slope != nullptr && !(room - rise >= -rule.sufficient * *j.slope)) scale = before / rule.grow;
  if (undo) scale = before * rule.shrink;
  if (scale < rule.smallest) scale = rule.smallest;
  if (scale > 1) scale = 1;
  if (ok) *j.scale = static_cast<T>(scale);
  j.counts[2] += undo && ok;
  j.counts[3] += order;
  j.decision[kUndo] = undo && ok;
  j.decision[kOrderG] = order;
  j.decision[kWaiting] = j.decision[kWaiting] || order;
  j.decision[kSoundPair] = ok && is_finite(loss_next);
  if (rule.take) take_order(j.decision, true, ok);
}

}  // namespace kbfgs
