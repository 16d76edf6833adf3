// The body of an architecture's translation unit, after its Vec; no include guard on purpose: it is
// compiled once a namespace.
// clang-format off: each builds on the one before
#include "blocks.h"
#include "sweep.h"
#include "full_sweep.h"
// clang-format on

const Sweeps kSweeps = {SVDK_ARCH_NAME,  sweep_sums,      sweep_sample, sweep_moments,
                        sweep_partition, sweep_histogram, sweep_gather, sweep_nth_tie};
