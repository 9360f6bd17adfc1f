// The device library on the simulator: the same sources, compiled by g++, and single stages for tests.
#include "runtime/cuda/backend.cu"
#include "runtime/cuda/persistent.cu"

#define DEEPCALM_STAGE_KERNELS 1
#include "kernels/cuda/stage_test.cc"
