// Admission (20) and judgement (14) on the CPU: nothing but scalars, a call of each a step.
#include "../bindings.h"
#include "safeguard_arguments.h"

namespace kbfgs {

namespace {

void admit_cpu(const Call& call) {
  const Tensors& norms = call.tensors("norms");
  by_dtype("cpu", norms, [&](auto zero) {
    Arguments<decltype(zero)> args(call, "cpu", kCpu);
    const auto all = admissions(args, norms);
    for (const auto& one : all) {
      bool bad = false;
      for (int64_t i = 0; i < one.n; ++i) bad |= !is_finite(one.norms[i]);
      admit(one, bad, call.integer("take") != 0);
    }
  });
}

void judge_cpu(const Call& call) {
  const Tensors& scale = call.tensors("scale");
  by_dtype("cpu", scale, [&](auto zero) {
    Arguments<decltype(zero)> args(call, "cpu", kCpu);
    const auto all = judgements(args, scale.size());
    const JudgeRule rule = judge_rule(call);
    const bool* flag = args.flag("ok");
    for (const auto& one : all) judge(one, rule, flag == nullptr || *flag);
  });
}

}  // namespace

Functions safeguard_ops() {
  return {{"admit_cpu", &admit_cpu}, {"judge_cpu", &judge_cpu}};
}

}  // namespace kbfgs
