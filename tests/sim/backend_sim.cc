// The device library on the simulator: the same sources, compiled by g++.
#include "runtime/cuda/backend.cu"
