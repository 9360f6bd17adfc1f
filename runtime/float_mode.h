// The floating-point mode of everything that computes bits: rounding to nearest, subnormals kept, no traps. A caller may have
// set another one (flush to zero, directed rounding), and a new thread has its creator's: results must depend on neither.
#pragma once

#include <cfenv>

namespace deepcalm {

// From here to the end of the scope the default mode (MXCSR 0x1F80, FPCR 0), then the caller's again. Out of line, and what
// computes must be out of line, too, beside it: compilers move arithmetic across a change of mode that they can see through.
class FloatMode {
  public:
    FloatMode();
    ~FloatMode();
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;

  private:
    std::fenv_t callers_;
};

}  // namespace deepcalm
