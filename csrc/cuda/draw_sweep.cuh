// Step 11 by a sweep over a whole row, by all CTAs of it: noise is drawn only for tokens that can
// still win.
#pragma once
#include "noise.cuh"
#include "read.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "team.cuh"

namespace svdk::cuda {

// The best perturbed (or greedy) steered logit that the filter keeps, as a key over the
// slices of this CTA, in part.best; exceptional tokens are noted on the way. Sets `noise`.
template <typename T, int S>
SVDK_DEVICE void draw_row(Cta& cta, const Operands<T, S>& row, const Constants& constants,
                          const Filter& filter_of_row, const Parameters& p, Noise& noise_of_row) {
  constexpr int N = Operands<T, S>::N;
  RowShared& s = cta.s;
  const FastConstants c(constants);
  const Noise& noise = noise_of_row;
  if (threadIdx.x == 0) {
    s.part.best = 0;
    s.running = ordered_key(-kFloatInf);  // here: the best score so far
    noise_of_row.set(p, c.template nats<S>());
  }
  __syncthreads();
  const Filter filter = filter_of_row;
  Exceptional exceptional{0, 0};
  BestKey best = 0;
  float need = -kFloatInf;  // a score below this has lost
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors<Operands<T, S>::kUnroll>(
        row, cta.begin(slice), cta.end(slice),
        [&](int at, int n, const float (&w)[N], const float (&y)[N]) SVDK_INLINED {
          float z[N], probe = 0.0f, top = -kFloatInf;
          SVDK_UNROLL
          for (int e = 0; e < N; ++e)
            probe = nonfinite_probe<S>(w[e], S == kNone ? 0.0f : y[e], probe);
          if (!is_finite(probe)) {
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              if (e < n) exceptional.look_at<S>(w[e], S == kNone ? 0.0f : y[e]);
            }
          }
          SVDK_UNROLL
          for (int e = 0; e < N; ++e) {
            z[e] = c.template steered_logit<S>(w[e], S == kNone ? 0.0f : y[e]);
            if (e >= n || !filter.keeps(z[e], at + e)) z[e] = -kFloatInf;
            top = fmaxf(top, z[e]);
          }
          if (top == -kFloatInf) return;
          need = fmaxf(need, key_value(read_shared(&s.running)));
          float score = -kFloatInf;
          int id = -1;
          if (noise.greedy) {
            if (top < need) return;
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              if (z[e] > score) {
                score = z[e];
                id = at + e;
              }
            }
          } else {
            // A token wins only if 1 - u < exp(bound - need): an integer compare before
            // logarithms.
            const float bound = top * noise.rate;
            const float slack = 1e-6f * (fabsf(bound) + 32.0f * noise.unit);
            const float gap = need == -kFloatInf ? 0.0f : (bound - need + slack) * noise.per_unit();
            if (gap + static_cast<float>(kLargestGumbel) < 0.0f) return;
            const float share = gap < 0.0f ? fast_exp(gap) * 1.0001f * 0x1p32f + 2.0f : 0x1p32f;
            const uint32_t from = share >= 0x1p32f ? 0u : ~static_cast<uint32_t>(share);
            uint32_t word[N], hits = 0;
            SVDK_UNROLL
            for (int k = 0; k < N / 4; ++k) {
              const PhiloxBlock block = philox(p.seed, p.offset, static_cast<uint32_t>(at) / 4 + k);
              SVDK_UNROLL
              for (int j = 0; j < 4; ++j) word[4 * k + j] = block.word[j];
            }
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              hits |= static_cast<uint32_t>(word[e] >= from && z[e] > -kFloatInf) << e;
            }
            // Few get this far: one copy of the logarithms, and selects instead of an
            // index, which would put the vector into local memory.
            for (; hits; hits &= hits - 1) {
              const int hit = lowest_bit(hits);
              float logit = z[0];
              uint32_t bits = word[0];
              SVDK_UNROLL
              for (int e = 1; e < N; ++e) {
                logit = hit == e ? z[e] : logit;
                bits = hit == e ? word[e] : bits;
              }
              const float x = fmaf(logit, noise.rate, noise.unit * gumbel(bits));
              if (x > score || id < 0) {
                score = x;
                id = at + hit;
              }
            }
          }
          if (id < 0) return;
          const BestKey key = best_key(score, id);
          if (key <= best) return;
          best = key;
          if (score > need) {
            need = score;
            atomicMax(&s.running, ordered_key(score));
          }
        });
  }
  leave_exceptional(s, exceptional);
  best = block_reduce(s.slots, best, Better());
  if (threadIdx.x == 0) s.part.best = best;
}

}  // namespace svdk::cuda
