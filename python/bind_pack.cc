#include <pybind11/pybind11.h>

void init_pack(pybind11::module_& m) { (void)m; }
