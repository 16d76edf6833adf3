// Sweeps over a whole row once its constants are known: for rows whose tokens in play do not fit
// the list. Done by all CTAs of the row together.
#pragma once
#include "list.h"

namespace svdk::cuda {

// The best perturbed (or greedy) steered logit that the filter keeps, as a key over the slices of
// this CTA, in part.best; NaN, infinities and masked tokens are noted on the way.
template <typename T, int S>
SVDK_DEVICE void draw_sweep(Cta& cta, const Pair<T, S>& row, const Context& context,
                            const Filter& filter_of_row, const SampleRow& p) {
  constexpr int N = Pair<T, S>::N;
  Shared& s = cta.s;
  if (threadIdx.x == 0) {
    s.part.best = s.best = 0;
    s.running = ordered_key(-SVDK_INF);  // here: the best score so far
  }
  __syncthreads();
  const FastContext c(context);
  const Filter filter = filter_of_row;
  const Noise noise{p.seed, p.offset,
                    p.temperature > 0 ? static_cast<float>(1.0 / p.temperature) : 1.0f,
                    p.temperature == 0};
  Oddities odd;
  unsigned long long best = 0;
  float need = -SVDK_INF;  // a score below this has lost
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors<Pair<T, S>::kUnroll>(
        row, cta.begin(slice), cta.end(slice),
        [&](int at, int n, const float (&w)[N], const float (&y)[N]) SVDK_INLINED {
          float z[N], doubt = 0.0f, top = -SVDK_INF;
          SVDK_UNROLL
          for (int e = 0; e < N; ++e) {
            const float other = S == kNone ? 0.0f : y[e];
            doubt = suspicion<S>(w[e], other, doubt);
            z[e] = c.template steered<S>(w[e], other);
            if (!filter.keeps(z[e], at + e)) z[e] = -SVDK_INF;
            top = fmaxf(top, z[e]);
          }
          if (!(doubt == 0.0f) || n < N) {
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              if (e >= n) {
                z[e] = -SVDK_INF;
              } else {
                odd.look_at<S>(w[e], S == kNone ? 0.0f : y[e]);
              }
            }
          }
          if (top == -SVDK_INF) return;
          need = fmaxf(need, key_value(read_shared(&s.running)));
          float score = -SVDK_INF;
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
            const float bound = top * noise.inverse_temperature;
            const float slack = 1e-6f * (fabsf(bound) + 32.0f);
            const float gap = need == -SVDK_INF ? 0.0f : bound - need + slack;
            if (gap + kLargestGumbel < 0.0f) return;
            const float share = gap < 0.0f ? fast_exp(gap) * 1.0001f * 0x1p32f + 2.0f : 0x1p32f;
            const uint32_t from = share >= 0x1p32f ? 0u : ~static_cast<uint32_t>(share);
            uint32_t word[N], hits = 0;
            SVDK_UNROLL
            for (int k = 0; k < N / 4; ++k) {
              const PhiloxBlock block =
                  philox(noise.seed, noise.offset, static_cast<uint32_t>(at) / 4 + k);
              SVDK_UNROLL
              for (int j = 0; j < 4; ++j) word[4 * k + j] = block.word[j];
            }
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              hits |= static_cast<uint32_t>(word[e] >= from && z[e] > -SVDK_INF) << e;
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
              const float x = logit * noise.inverse_temperature + gumbel(bits);
              if (x > score || id < 0) {
                score = x;
                id = at + hit;
              }
            }
          }
          if (id < 0) return;
          const unsigned long long key = best_key(score, id);
          if (key <= best) return;
          best = key;
          if (score > need) {
            need = score;
            atomicMax(&s.running, ordered_key(score));
          }
        });
  }
  odd.leave(s);
  best = block_max(s, best);
  if (threadIdx.x == 0) s.part.best = best;
}

// The token of a row that cannot be sampled: argmax over its finite warm logits, 0 if there are
// none. By one CTA alone.
template <typename T, int S>
SVDK_DEVICE int fallback_token(Shared& s, const Pair<T, S>& row, int vocab) {
  const Pair<T, kNone> warm{row.warm, {}};
  unsigned long long best = 0;
  for_vectors(warm, 0, vocab, [&](int at, int n, const auto& w, const auto&) {
    SVDK_UNROLL
    for (int e = 0; e < Pair<T, kNone>::N; ++e) {
      if (e >= n || !is_finite(w[e])) continue;
      const unsigned long long key = best_key(w[e], at + e);
      if (key > best) best = key;
    }
  });
  best = block_max(s, best);
  return best ? best_id(best) : 0;
}

template <typename T, int S>
SVDK_DEVICE Moments whole_moments(Cta& cta, const Pair<T, S>& row, const Context& context) {
  constexpr int N = Pair<T, S>::N;
  const FastContext c(context);
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    float mean = 0, norm2 = 0, second = 0;
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int, int n, const float (&w)[N], const float (&y)[N]) {
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (e >= n || !(w[e] >= c.from)) continue;
                    const float d = c.template delta<S>(w[e], S == kNone ? 0.0f : y[e]);
                    const float pd = fast_exp(w[e] - c.lse) * d;
                    mean += pd;
                    norm2 = fmaf(d, d, norm2);
                    second = fmaf(pd, d, second);
                  }
                });
    mean = warp_sum(mean);
    norm2 = warp_sum(norm2);
    second = warp_sum(second);
    if (lane_id() == 0) cta.s.part.sums[slice][warp_id()] = {{mean, norm2, second}};
  }
  double total[3];
  merge_plain(cta, total);
  return {total[0], total[1], total[2]};
}

// Sums of e = exp(z - max) over a row, with the moments of what moves with mu.
struct Partition {
  float max;
  double z, first, second;
  unsigned long long greedy;  // argmax over C
};

template <typename T, int S>
SVDK_DEVICE Partition whole_partition(Cta& cta, const Pair<T, S>& row, const Context& context) {
  constexpr int N = Pair<T, S>::N;
  Shared& s = cta.s;
  const FastContext c(context);
  const float outside = c.drop ? 0.0f : static_cast<float>(context.penalty);
  unsigned long long greedy = 0;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    float max = -SVDK_INF, total = 0, first = 0, second = 0;
    for_vectors(
        row, cta.begin(slice), cta.end(slice),
        [&](int at, int n, const float (&w)[N], const float (&y)[N]) {
          float z[N], top = -SVDK_INF;
          SVDK_UNROLL
          for (int e = 0; e < N; ++e) {
            z[e] = e < n ? c.template steered<S>(w[e], S == kNone ? 0.0f : y[e]) : -SVDK_INF;
            top = fmaxf(top, z[e]);
            if (z[e] > -SVDK_INF && w[e] >= c.from) {
              const unsigned long long key = best_key(z[e], at + e);
              if (key > greedy) greedy = key;
            }
          }
          if (top == -SVDK_INF) return;
          if (top > max) {
            const float keep = max == -SVDK_INF ? 0.0f : fast_exp(max - top);
            total *= keep;
            first *= keep;
            second *= keep;
            max = top;
          }
          SVDK_UNROLL
          for (int e = 0; e < N; ++e) {
            if (z[e] == -SVDK_INF) continue;
            const float move =
                w[e] >= c.from ? c.template delta<S>(w[e], S == kNone ? 0.0f : y[e]) : outside;
            const float x = fast_exp(z[e] - max);
            total += x;
            first = fmaf(x, move, first);
            second = fmaf(x * move, move, second);
          }
        });
    const float high = warp_max_of(max);
    const float keep = max == -SVDK_INF ? 0.0f : fast_exp(max - high);
    total = warp_sum(total * keep);
    first = warp_sum(first * keep);
    second = warp_sum(second * keep);
    if (lane_id() == 0) s.part.sums[slice][warp_id()] = {{high, total, first, second}};
  }
  greedy = block_max(s, greedy);
  if (threadIdx.x == 0) s.part.best = greedy;

  const Parts parts = cta.own_parts();
  cta.team_barrier();
  Partition result{-SVDK_INF, 0, 0, 0, 0};
  const int entries = cta.slices.count * kWarps;
  SVDK_ROLLED
  for (int e = lane_id(); e < entries; e += 32) {
    result.max = fmaxf(
        result.max, parts.at(cta.owner(e / kWarps, parts.count)).sums[e / kWarps][e % kWarps].v[0]);
  }
  result.max = warp_max_of(result.max);
  SVDK_ROLLED
  for (int e = lane_id(); e < entries; e += 32) {
    const WarpSums& x = parts.at(cta.owner(e / kWarps, parts.count)).sums[e / kWarps][e % kWarps];
    if (x.v[0] == -SVDK_INF) continue;
    const double keep = fast_exp(x.v[0] - result.max);
    result.z += keep * x.v[1];
    result.first += keep * x.v[2];
    result.second += keep * x.v[3];
  }
  result.z = warp_sum(result.z);
  result.first = warp_sum(result.first);
  result.second = warp_sum(result.second);
  SVDK_ROLLED
  for (int r = 0; r < parts.count; ++r) {
    if (parts.at(r).best > result.greedy) result.greedy = parts.at(r).best;
  }
  cta.team_barrier();
  return result;
}

}  // namespace svdk::cuda
