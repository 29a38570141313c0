// The judgement (14) on the CPU: nothing but scalars, one call a step.
#include "../bindings.h"
#include "safeguard_arguments.h"

namespace kbfgs {

namespace {

void judge_cpu(const Call& call) {
  const Tensors& scale = call.tensors("scale");
  by_dtype("cpu", scale, [&](auto zero) {
    Arguments<decltype(zero)> args(call, "cpu", at::kCPU);
    const auto all = judgements(args, scale.size());
    const JudgeRule rule = judge_rule(call);
    const bool* flag = args.flag("ok");
    for (const auto& one : all) judge(one, rule, flag == nullptr || *flag);
  });
}

}  // namespace

Functions safeguard_ops() {
  return {{"judge_cpu", &judge_cpu}};
}

}  // namespace kbfgs
