// The body of an architecture's translation unit, after its Vec; no include guard on purpose: it is
// compiled once a namespace.
// clang-format off: each builds on those before it
#include "blocks.h"
#include "sweep.h"
#include "full_sweep.h"
#include "draw_sweep.h"
#include "filter_sweep.h"
// clang-format on

const Sweeps kSweeps = {SVDK_ARCH_NAME, first_sweep, draw_row, token_at,  moments,
                        partition,      steer,       gather,   look_into, nth_tie};
