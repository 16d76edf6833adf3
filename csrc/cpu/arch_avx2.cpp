// The sweeps for AVX2 machines.
#include "arch_headers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
SVDK_TARGET_BEGIN("avx2,fma,f16c,bmi")
namespace svdk::avx2 {
#include "vec_avx2.h"
#define SVDK_ARCH_NAME "avx2"
#include "arch_body.h"
}  // namespace svdk::avx2
SVDK_TARGET_END

namespace svdk {
namespace {
// Not by name: clang 14 does not know "f16c".
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
}  // namespace

const Sweeps* sweeps_avx2() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && has_f16c();
  return here ? &avx2::kSweeps : nullptr;
}
}  // namespace svdk
#else
namespace svdk {
const Sweeps* sweeps_avx2() { return nullptr; }
}  // namespace svdk
#endif
