// fastconv._C: what the package can tell about its kernels without touching a tensor. No torch in here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/isa.h"
#include "common/registry.h"

namespace py = pybind11;
using namespace fastconv;

namespace {

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const KernelName& name : kKernelNames) names.push_back(std::string(name.op) + "/" + name.algo);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::generic, Isa::neon, Isa::avx2, Isa::avx512})
    if (cpu_supports(isa)) names.push_back(name_of(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels, plans and build information of fastconv";
  m.def("kernel_names", &kernel_names, "Every kernel as op/algo, in the order of torch.ops.fastconv.kernel_counts()");
  m.def("supported_isas", &supported_isas, "Instruction sets that this CPU has and fastconv has kernels for");
  m.def("active_isa", [] { return std::string(name_of(active_isa())); }, "The instruction set in use");
}
