// kbfgs_ext._C: functions <op>cpu and <op>cuda, each taking a call of the op as a dict by argument
// name. They are in their family's bindings_cpu.cpp and bindings_cuda.cpp. Whatever the kernels do not
// take raises Unsupported, always before anything is written.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/python.h"

#ifdef KBFGS_WITH_CUDA
namespace kbfgs::cuda {
void bind(pybind11::module_& module);  // bindings_cuda.cpp
}
#endif

namespace kbfgs {

namespace {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};  // in the order of Isa

std::vector<std::string> instruction_sets() {
  return {kIsaNames, kIsaNames + static_cast<int>(widest_isa()) + 1};
}

void use_instruction_set(const std::string& name) {
  for (size_t i = 0; i < instruction_sets().size(); ++i)
    if (name == kIsaNames[i]) return active_isa().store(static_cast<Isa>(i));
  throw std::invalid_argument("this processor has no instruction set " + name);
}

}  // namespace

}  // namespace kbfgs

PYBIND11_MODULE(_C, module) {
  using namespace kbfgs;
  translate_unsupported();
  for (const auto& ops :
       {bfgs_update_ops(), double_damping_ops(), factor_ema_ops(), kron_precondition_ops(),
        lbfgs_two_loop_ops(), safeguard_ops(), spectral_ops()})
    define(module, ops);
  module.def("instruction_sets", &instruction_sets);        // that run here; the last is in use
  module.def("use_instruction_set", &use_instruction_set);  // for tests of the others
#ifdef KBFGS_WITH_CUDA
  cuda::bind(module);
  module.def("has_cuda", [] { return true; });
#else
  module.def("has_cuda", [] { return false; });
#endif
}
