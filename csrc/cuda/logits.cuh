// steered_logits: steps 1 to 9 of every row in one launch, written out whole. With a mask only the
// candidates are steered, and each logit is read once; else every CTA of the row reads its slices
// once more. A token is written by the CTA that reads it, after all have been read for the sums, so
// that a row may be steered in place.
#pragma once
#include "full_sweep.cuh"
#include "steering.cuh"
#include "sweep.cuh"
#include "team.cuh"

namespace svdk::cuda {

struct LogitsShared {
  RowShared row;
  Candidate unordered[kCapacity];
};

// One row of the output: floats, or as the warm logits are.
template <typename T>
struct RowTo {
  float* wide;
  T* narrow;
  SVDK_DEVICE RowTo(const LogitsArgs& a, int row) {
    const int64_t start = row * a.stride;
    wide = a.narrow ? nullptr : static_cast<float*>(a.out) + start;
    narrow = a.narrow ? static_cast<T*>(a.out) + start : nullptr;
  }
  SVDK_DEVICE void write(int at, float z) const {
    if (wide) {
      wide[at] = z;
    } else {
      encode(z, narrow + at);
    }
  }
};

// Every token of this CTA's slices: z(id).
template <typename T, typename F>
SVDK_DEVICE void write_slices(const Cta& cta, const RowTo<T>& to, const F& z) {
  const int end = cta.end(cta.last_slice() - 1);
  SVDK_UNROLL4
  for (int i = cta.begin(cta.first_slice()) + thread_id(); i < end; i += kThreads) {
    to.write(i, z(i));
  }
}

// What is known of a row once it is written; the columns beside the vocabulary, too.
template <typename T>
SVDK_DEVICE void close_row(const LogitsArgs& a, const Cta& cta, const RowTo<T>& to, int status) {
  if (!cta.leads()) return;
  if (threadIdx.x == 0) a.status[cta.row] = status;
  SVDK_ROLLED
  for (int i = cta.vocab + thread_id(); i < a.width; i += kThreads) to.write(i, -kFloatInf);
}

SVDK_DEVICE float within_float(double z) {
  return z < -DBL_MAX ? -kFloatInf : static_cast<float>(clamped(z, FLT_MAX));
}

// Step 9.
template <typename T, int S>
SVDK_DEVICE void steer_row(Cta& cta, const Operands<T, S>& row, const Constants& c, int n,
                           const RowTo<T>& to) {
  if (n < 0 || !c.drops_outside()) {
    write_slices(cta, to, [&](int i) {
      return within_float(c.steered_logit(read_one(row.warm, i), other_at(row, i)));
    });
    return;
  }
  write_slices(cta, to, [](int) { return -kFloatInf; });
  __syncthreads();
  const Part& first = cta.own_parts().at(0);
  const int begin = cta.begin(cta.first_slice()), end = cta.end(cta.last_slice() - 1);
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const Candidate k = first.candidates[i];
    if (k.id < begin || k.id >= end) continue;
    to.write(k.id, within_float(c.steered_logit(k.warm, k.other)));
  }
  cta.team_barrier();  // the first CTA's candidates have been read
}

template <typename T, int S>
SVDK_DEVICE void logits_row(const LogitsArgs& a, LogitsShared& s) {
  Cta cta(s.row, a.rows);
  const RowTo<T> to(a, cta.row);
  Operands<T, S> row{};
  load_parameters(s.row, a.rows, cta.row);
  const Readable readable = open_operands(a.rows, cta.row, row);
  if (a.skip && a.skip[cta.row] && readable != kNothing) {
    write_slices(cta, to, [&](int i) { return read_one(row.warm, i); });
    close_row(a, cta, to, kOk);
    return;
  }
  bool invalid = !s.row.parameters.valid || readable != kBoth;
  if (!invalid) {
    if (!open_row(cta, a.rows, row, s.unordered)) return;
    invalid = s.row.broadcast.next == kRefuse;
  }
  if (invalid) {
    write_slices(cta, to, [](int) { return static_cast<float>(kNaN); });
    close_row(a, cta, to, kInvalid);
    return;
  }
  Constants& c = s.row.broadcast.constants;
  const int n = s.row.broadcast.n_candidates;
  cta.team_barrier();  // what was broadcast has been read
  if (threadIdx.x == 0) c.inside_from = inside_from(c.max_w, c.log_alpha);
  __syncthreads();
  set_strength(cta, row, n);
  steer_row(cta, row, c, n, to);
  close_row(a, cta, to, s.row.sums.exceptional.flags & kBaseMasked);
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) steered_logits_kernel(LogitsArgs a) {
  SVDK_SHARED(LogitsShared, s);
  logits_row<T, S>(a, s);
}

}  // namespace svdk::cuda
