// Module deepcalm._core: thin conversions between Python objects and the C++ runtime. No model knowledge here.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void init_pack(py::module_& m);     // bind_pack.cc: formats, manifest, packing
void init_testing(py::module_& m);  // bind_testing.cc: single kernels, for the oracles

PYBIND11_MODULE(_core, m) {
    m.attr("__version__") = DEEPCALM_VERSION;
    init_pack(m);
    py::module_ testing = m.def_submodule("testing", "Single kernels, called by the test oracles.");
    init_testing(testing);
}
