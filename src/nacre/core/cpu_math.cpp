// The functions of cpu_math.h over arrays, for tests/test_cpu_math.py, which calls them with ctypes.
#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_export.h"

namespace nacre {
namespace {

template <class A, class Function>
void over_array(const A* x, A* y, int64_t count, Function function) {
  over_row<A>(count, [&](int64_t i, auto which) { store(y + i, function(load(x + i, which)), which); });
}

}  // namespace
}  // namespace nacre

#define NACRE_EXPORT_FUNCTION(name)                                                       \
  NACRE_EXPORT void nacre_##name##_float32(const float* x, float* y, int64_t count) {     \
    nacre::over_array(x, y, count, nacre::name<float>);                                   \
  }                                                                                       \
  NACRE_EXPORT void nacre_##name##_float64(const double* x, double* y, int64_t count) {   \
    nacre::over_array(x, y, count, nacre::name<double>);                                  \
  }

NACRE_EXPORT_FUNCTION(exp)
NACRE_EXPORT_FUNCTION(exp2_of_negative)
NACRE_EXPORT_FUNCTION(log)
NACRE_EXPORT_FUNCTION(tanh)
NACRE_EXPORT_FUNCTION(sigmoid)
NACRE_EXPORT_FUNCTION(erf)
