// admit (20): a warp for each; judge (14): a thread for each; all in one launch.
#include "safeguard_cuda.h"

#include <algorithm>

#include "../common/device.cuh"

namespace kbfgs::cuda {

namespace {

template <typename T>
struct AdmitTable {
  Admission<T> admission[kLayersPerLaunch];
  bool take;
};

template <typename T>
__global__ void __launch_bounds__(kWarp) admit_kernel(const __grid_constant__ AdmitTable<T> t) {
  const Admission<T>& a = t.admission[blockIdx.x];
  float bad = 0;
  for (int64_t i = threadIdx.x; i < a.n; i += kWarp) bad += !finite(a.norms[i]);
  bad = warp_sum(bad);
  if (threadIdx.x == 0) kbfgs::admit(a, bad != 0, t.take);
}

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
void admit(const std::vector<Admission<T>>& admissions, bool take, cudaStream_t stream) {
  for (size_t begin = 0; begin < admissions.size(); begin += kLayersPerLaunch) {
    AdmitTable<T> t{};
    const size_t count = std::min<size_t>(kLayersPerLaunch, admissions.size() - begin);
    std::copy_n(admissions.begin() + begin, count, t.admission);
    t.take = take;
    launch(&admit_kernel<T>, {unsigned(count), kWarp, 0, false}, stream, t);
  }
}

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

template void admit<float>(const std::vector<Admission<float>>&, bool, cudaStream_t);
template void admit<double>(const std::vector<Admission<double>>&, bool, cudaStream_t);
template void judge<float>(
    const std::vector<Judge<float>>&, const JudgeRule&, const bool*, cudaStream_t);
template void judge<double>(
    const std::vector<Judge<double>>&, const JudgeRule&, const bool*, cudaStream_t);

}  // namespace kbfgs::cuda
