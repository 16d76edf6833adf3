// Everything an architecture's translation unit includes before its target begins, so that no
// standard inline function is ever compiled for instructions the machine may lack.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../philox.h"
#include "steering.h"

#define SVDK_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define SVDK_TARGET_BEGIN(list) \
  SVDK_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define SVDK_TARGET_END SVDK_PRAGMA(clang attribute pop)
#else
#define SVDK_TARGET_BEGIN(list) SVDK_PRAGMA(GCC push_options) SVDK_PRAGMA(GCC target(list))
#define SVDK_TARGET_END SVDK_PRAGMA(GCC pop_options)
#endif

namespace svdk {

inline float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, exponent = (x >> 10) & 31, fraction = x & 1023;
  uint32_t bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  if (exponent == 31) bits = sign | 0x7f800000u | (fraction << 13);
  float f;
  std::memcpy(&f, &bits, sizeof f);
  if (exponent == 0) f = (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  return f;
}

}  // namespace svdk
