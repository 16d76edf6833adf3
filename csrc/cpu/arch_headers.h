// Everything an architecture's translation unit includes before its target begins, so that no
// standard inline function is ever compiled for instructions the machine may lack.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "arch.h"

#define SVDK_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define SVDK_TARGET_BEGIN(list) \
  SVDK_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define SVDK_TARGET_END SVDK_PRAGMA(clang attribute pop)
#else
#define SVDK_TARGET_BEGIN(list) SVDK_PRAGMA(GCC push_options) SVDK_PRAGMA(GCC target(list))
#define SVDK_TARGET_END SVDK_PRAGMA(GCC pop_options)
#endif

// For what is done to every block: called, its loops would have fewer registers.
#define SVDK_INLINED __attribute__((always_inline)) inline
