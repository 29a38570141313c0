// Admission (20) and judgement (14) on CUDA.
#include "../bindings.h"
#include "../common/cuda_arguments.h"
#include "safeguard_arguments.h"
#include "safeguard_cuda.h"

namespace kbfgs::cuda {

namespace {

void admit_cuda(const Call& call) {
  const Tensors& norms = call.tensors("norms");
  by_dtype("cuda", norms, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, norms[0]);
    admit(admissions(args, norms), call.integer("take") != 0, args.stream());
  });
}

void judge_cuda(const Call& call) {
  const Tensors& scale = call.tensors("scale");
  by_dtype("cuda", scale, [&](auto zero) {
    CudaArguments<decltype(zero)> args(call, scale[0]);
    const auto all = judgements(args, scale.size());
    judge(all, judge_rule(call), args.flag("ok"), args.stream());
  });
}

}  // namespace

Functions safeguard_ops() {
  return {{"admit_cuda", &admit_cuda}, {"judge_cuda", &judge_cuda}};
}

}  // namespace kbfgs::cuda
