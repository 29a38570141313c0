// judge (14): a thread for each judgement, all in one launch.
#include "safeguard_cuda.h"

#include <algorithm>

#include "../common/device.cuh"

namespace kbfgs::cuda {

namespace {

template <typename T>
struct JudgeTable {
  Judge<T> judgement[kLayersPerLaunch];
  JudgeRule rule;
  const bool* ok;
};

template <typename T>
__global__ void __launch_bounds__(kWarp) judge_kernel(const __grid_constant__ JudgeTable<T> t) {
  if (threadIdx.x == 0) kbfgs::judge(t.judgement[blockIdx.x], t.rule, flag(t.ok));
}

}  // namespace

template <typename T>
void judge(
    const std::vector<Judge<T>>& judgements, const JudgeRule& rule, const bool* ok,
    cudaStream_t stream) {
  for (size_t begin = 0; begin < judgements.size(); begin += kLayersPerLaunch) {
    JudgeTable<T> t{};
    const size_t count = std::min<size_t>(kLayersPerLaunch, judgements.size() - begin);
    std::copy_n(judgements.begin() + begin, count, t.judgement);
    t.rule = rule;
    t.ok = ok;
    launch(&judge_kernel<T>, {unsigned(count), kWarp, 0, false}, stream, t);
  }
}

template void judge<float>(
    const std::vector<Judge<float>>&, const JudgeRule&, const bool*, cudaStream_t);
template void judge<double>(
    const std::vector<Judge<double>>&, const JudgeRule&, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
