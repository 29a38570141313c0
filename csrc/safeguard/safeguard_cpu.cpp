// The judgement (14) on the CPU: nothing but scalars, one call a step.
#include "safeguard_arguments.h"

namespace kbfgs {

void judge_cpu(
    const Tensors& scale, const Tensors& watched, const Tensors& counts, const Tensors& decision,
    const Tensors& loss, const Tensors& loss_next, const Tensors& slope, double noise,
    double shrink, double grow, double sufficient, double smallest, double surge, int64_t window,
    std::optional<int64_t> restart_after, const Flag& ok) {
  by_dtype("cpu", scale, [&](auto zero) {
    Arguments<decltype(zero)> args("cpu", at::kCPU);
    const auto all = judgements(args, scale, watched, counts, decision, loss, loss_next, slope);
    const int64_t after = restart_after.value_or(0);
    const JudgeRule rule{noise, shrink, grow, sufficient, smallest, surge, window, after};
    const bool* flag = args.flag("ok", ok);
    for (const auto& one : all) judge(one, rule, flag == nullptr || *flag);
  });
}

}  // namespace kbfgs
