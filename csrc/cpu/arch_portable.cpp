// The sweeps for any machine, in the compiler's own 4-float vectors (SSE2, NEON, ...).
#include "arch_headers.h"

namespace svdk::portable {
#include "vec_portable.h"
#define SVDK_ARCH_NAME "portable"
#include "arch_body.h"
}  // namespace svdk::portable

namespace svdk {
const Sweeps* sweeps_portable() { return &portable::kSweeps; }
}  // namespace svdk
