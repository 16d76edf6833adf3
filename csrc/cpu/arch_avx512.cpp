// The sweeps for AVX-512 machines.
#include "arch_headers.h"

#if defined(__x86_64__)
#include <immintrin.h>
SVDK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi")
namespace svdk::avx512 {
#include "vec_avx512.h"
#define SVDK_ARCH_NAME "avx512"
#include "arch_body.h"
}  // namespace svdk::avx512
SVDK_TARGET_END

namespace svdk {
const Sweeps* sweeps_avx512() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return here ? &avx512::kSweeps : nullptr;
}
}  // namespace svdk
#else
namespace svdk {
const Sweeps* sweeps_avx512() { return nullptr; }
}  // namespace svdk
#endif
