// kbfgs_ext._C: functions <op>cpu and <op>cuda (pair_ema_cpu), each taking a call of the op as a dict
// by argument name (common/call.h). They are in their family's bindings_cpu.cpp and bindings_cuda.cpp.
// Whatever the kernels do not take raises Unsupported, always before anything is written.
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.h"
#include "common/arguments.h"
#include "common/isa.h"

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
  bind_bfgs_update(module);
  bind_double_damping(module);
  bind_factor_ema(module);
  bind_kron_precondition(module);
  bind_lbfgs_two_loop(module);
  bind_safeguard(module);
  module.def("instruction_sets", &instruction_sets);        // that run here; the last is in use
  module.def("use_instruction_set", &use_instruction_set);  // for tests of the others
#ifdef KBFGS_WITH_CUDA
  cuda::bind(module);
  module.def("has_cuda", [] { return true; });
#else
  module.def("has_cuda", [] { return false; });
#endif
}
