// The hot loops alone, so that they compile in seconds and are easy to find in the machine code
// (tests/helpers/cuda_sass.py).
#include "sample.cuh"

namespace svdk::cuda {

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) probe_first_sweep(SampleArgs a) {
  SVDK_SHARED(RowShared, s);
  Cta cta(s, a.rows);
  Operands<T, S> row{};
  if (open_operands(a.rows, cta.row, row) != kBoth) return;
  load_parameters(s, a.rows, cta.row);
  const double log_alpha = s.parameters.log_alpha;  // as in open_row, where it may be read again
  const bool collect = log_alpha > -DBL_MAX || cta.vocab <= kCapacity;
  clear_part(s);
  first_sweep(cta, row, s.parameters.fast_log_alpha, collect);
  __syncthreads();
  if (threadIdx.x == 0) a.rows.parts[blockIdx.x] = s.part;
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) probe_draw_row(SampleArgs a) {
  SVDK_SHARED(SampleShared, s);
  Cta cta(s.row, a.rows);
  Operands<T, S> row{};
  if (open_operands(a.rows, cta.row, row) != kBoth) return;
  load_parameters(s.row, a.rows, cta.row);
  clear_part(s.row);
  Constants& c = s.row.broadcast.constants;
  if (threadIdx.x == 0) {
    c = direct_constants(a.rows, s.row.parameters.strength);
    s.draw.set(s.row.parameters, FastConstants(c).template nats<S>());
    s.draw.filter = Filter::none();
  }
  __syncthreads();
  draw_row(cta, row, c, s.draw);
  __syncthreads();
  if (threadIdx.x == 0) a.rows.parts[blockIdx.x] = s.row.part;
}

template __global__ void probe_first_sweep<BFloat16, kBase>(SampleArgs);
template __global__ void probe_draw_row<BFloat16, kNone>(SampleArgs);

}  // namespace svdk::cuda
