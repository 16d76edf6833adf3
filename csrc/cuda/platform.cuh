// What the kernels need of the machine beyond plain CUDA C++. Anything that is PTX or an intrinsic
// sits behind a named function here; the tests build the same kernels for the CPU with their own
// version of these functions (tests/shim/shim.h).
#pragma once
#include <cfloat>
#include <cstdint>

#ifdef SVDK_SHIM
#include "shim.h"
#else
#include <cooperative_groups.h>

#define SVDK_DEVICE __device__ __forceinline__
#define SVDK_SHARED(type, name) __shared__ type name
#define SVDK_UNROLL _Pragma("unroll")
#define SVDK_UNROLL4 _Pragma("unroll 4")
#define SVDK_ROLLED _Pragma("unroll 1")  // cold, or large: registers matter more

namespace svdk::cuda {

// 16 bytes through the read-only path; each logit is used once, so L1 need not keep it.
SVDK_DEVICE uint4 load16(const void* p) {
  uint4 x;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(p));
  return x;
}

// A float that is not loaded ahead of others like it, which would take a register each.
SVDK_DEVICE float load_in_turn(const float* p) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(p));
  return x;
}

// 2^x to 2 ulp; 0 below 2^-126.
SVDK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

SVDK_DEVICE float half_to_float(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// The larger of each half; a NaN loses.
SVDK_DEVICE uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
SVDK_DEVICE uint32_t max_halfx2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Largest value over the warp.
SVDK_DEVICE uint32_t warp_max(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }

// The first lane that says yes; 32: none.
SVDK_DEVICE int warp_first(bool yes) {
  const uint32_t lanes = __ballot_sync(0xffffffffu, yes);
  return lanes ? __ffs(lanes) - 1 : 32;
}

// A shared variable that other warps may be writing.
SVDK_DEVICE uint32_t read_shared(const uint32_t* p) {
  return *static_cast<const volatile uint32_t*>(p);
}

SVDK_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
SVDK_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
SVDK_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t bits) {
  return __funnelshift_r(low, high, bits);
}

// The CTAs of a cluster: a barrier that orders shared memory too, and another CTA's copy of a
// shared variable. Never reached below sm_90, where the launch uses no clusters.
SVDK_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}
template <typename T>
SVDK_DEVICE T* remote(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  __trap();
  return shared;
#endif
}

}  // namespace svdk::cuda
#endif

// For lambdas: one that is used twice is otherwise called, with its captures on the stack.
#define SVDK_INLINED __attribute__((always_inline))

namespace svdk::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMinBlocks = 2;  // resident CTAs that the register budget allows for

SVDK_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
SVDK_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31); }
SVDK_DEVICE int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
SVDK_DEVICE float fast_exp(float x) { return exp2_approx(x * kLog2e); }

// The arithmetic of the formulas in csrc/common.h: in double but for exponentials and logarithms.
struct Math {
  SVDK_DEVICE static float exp(float x) { return fast_exp(x); }
  SVDK_DEVICE static double exp(double x) { return fast_exp(static_cast<float>(x)); }
  SVDK_DEVICE static double log(double x) { return logf(static_cast<float>(x)); }
};

}  // namespace svdk::cuda
