// The body of an architecture's translation unit, after its Vec; no include guard on purpose: it is
// compiled once a namespace.
#include "blocks.h"
#include "sweeps.h"
#include "sweeps_full.h"

const Sweeps kSweeps = {SVDK_ARCH_NAME,  sweep_sums,      sweep_sample, sweep_moments,
                        sweep_partition, sweep_histogram, sweep_gather, sweep_nth_tie};
