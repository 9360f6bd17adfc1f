#include "runtime/float_mode.h"

namespace deepcalm {

FloatMode::FloatMode() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
}

FloatMode::~FloatMode() { std::fesetenv(&callers_); }

}  // namespace deepcalm
