// Sweeps over a whole row once its constants are known: for rows whose tokens in play do not fit
// the list. Done by all CTAs of the row together.
#pragma once
#include "candidates.cuh"

namespace svdk::cuda {

// The best perturbed (or greedy) steered logit that the filter keeps, as a key over the slices of
// this CTA, in part.best; NaN, infinities and masked tokens are noted on the way.
template <typename T, int S>
SVDK_DEVICE void draw_sweep(Cta& cta, const Pair<T, S>& row, const Context& context,
                            const Filter& filter_of_row, const SampleRow& p) {
  constexpr int N = Pair<T, S>::N;
  Shared& s = cta.s;
  const FastContext c(context);
  const Noise& noise = s.noise;
  if (threadIdx.x == 0) {
    s.part.best = s.best = 0;
    s.running = ordered_key(-SVDK_INF);  // here: the best score so far
    s.noise.set(p, c.template nats<S>());
  }
  __syncthreads();
  const Filter filter = filter_of_row;
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
          for (int e = 0; e < N; ++e) doubt = suspicion<S>(w[e], S == kNone ? 0.0f : y[e], doubt);
          if (!is_finite(doubt)) {
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              if (e < n) odd.look_at<S>(w[e], S == kNone ? 0.0f : y[e]);
            }
          }
          SVDK_UNROLL
          for (int e = 0; e < N; ++e) {
            z[e] = c.template steered<S>(w[e], S == kNone ? 0.0f : y[e]);
            if (e >= n || !filter.keeps(z[e], at + e)) z[e] = -SVDK_INF;
            top = fmaxf(top, z[e]);
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
            const float bound = top * noise.rate;
            const float slack = 1e-6f * (fabsf(bound) + 32.0f * noise.unit);
            const float gap = need == -SVDK_INF ? 0.0f : (bound - need + slack) * noise.per_unit();
            if (gap + kLargestGumbel < 0.0f) return;
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
              const float x = fmaf(logit, noise.rate, noise.unit * gumbel(bits));
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

// Token by token: whole vectors and sums in double together take too many registers.
template <typename T, int S>
SVDK_DEVICE MomentSums whole_moments(Cta& cta, const Pair<T, S>& row, const Context& context,
                                     double pivot) {
  const FastContext c(context);
  constexpr double unit = FastContext::unit<S>();
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    MomentSums m{0, 0, 0, 0};
    SVDK_UNROLL4
    for (int i = cta.begin(slice) + static_cast<int>(threadIdx.x); i < cta.end(slice);
         i += kThreads) {
      const float w = read_one(row.warm, i), other = other_at(row, i);
      if (w >= c.from) m.add(c.p(c.shrunk(w)), c.template delta<S>(w, other) * unit, pivot);
    }
    leave_sums(cta.s, slice, m.mass, m.first, m.second, m.norm2);
  }
  double total[4];
  merge_plain(cta, total);
  return {total[0], total[1], total[2], total[3]};
}

// The moments of a row: over the `listed` tokens of the list, by its CTA alone, or (listed < 0)
// over the whole row, by all CTAs of it.
template <typename T, int S>
SVDK_DEVICE Moments moments_of(Cta& cta, const Pair<T, S>& row, const Context& c, int listed) {
  Shared& s = cta.s;
  const bool whole = listed < 0;
  const int size = cta.size;
  if (!whole) cta.size = 1;  // the others wait
  double pivot = whole ? 0.0 : list_pivot<S>(s, listed);
  if (whole && S == kVectorRow) pivot = other_at(row, fallback_token(s, row, cta.vocab));
  const MomentSums sums =
      whole ? whole_moments(cta, row, c, pivot) : list_moments<S>(s, c, listed, pivot);
  const bool everything = whole ? c.log_alpha < -DBL_MAX : listed == c.finite;
  // With a pivot, the mass outside C has a part in the sums: what lacks to 1, or summed on its own
  // where so little is left that rounding could matter.
  double total = 1, outside = 0;
  if (S == kVectorRow) {
    outside = everything ? 0.0 : 1 - sums.mass;
    if (!everything && outside < 0.03) {
      outside = fast_exp(static_cast<float>(log_outside(cta, row, c) - c.log_w));
    }
    total = sums.mass + outside;
  }
  cta.size = size;
  return sums.about(pivot, outside, total);
}

// Sums of e = exp(z - top) over a row, and of e (m - pivot) and e (m - pivot)^2 of what moves with
// mu, m. The pivot is the m of the largest z so far: about 0, the variance of an m with a common
// offset would be lost in rounding. z and m in FastContext's units.
struct Partition {
  float top, pivot;
  double z, first, second;

  SVDK_DEVICE void rise(float to, float new_pivot, float nats) {
    const double keep = top == -SVDK_INF ? 0.0 : fast_exp((top - to) * nats);
    const double d = static_cast<double>(pivot) - new_pivot;
    second = keep * (second + 2 * d * first + d * d * z);
    first = keep * (first + d * z);
    z *= keep;
    top = to;
    pivot = new_pivot;
  }
  SVDK_DEVICE void add(const Partition& x) {
    z += x.z;
    first += x.first;
    second += x.second;
  }
};

// What the curves of a strength need of a row. `top` is less max_w and in FastContext's units.
struct Summary {
  float top;
  double log_z, mean, variance;
  unsigned long long greedy;  // argmax over C
};

SVDK_DEVICE Partition warp_total(Partition x, float nats) {
  const float top = warp_max_of(x.top);
  const float pivot = warp_max_of(x.top == top ? x.pivot : -SVDK_INF);
  if (top == -SVDK_INF) return {top, 0.0f, 0, 0, 0};
  x.rise(top, pivot, nats);
  return {top, pivot, warp_sum(x.z), warp_sum(x.first), warp_sum(x.second)};
}

template <typename T, int S>
SVDK_DEVICE Summary whole_partition(Cta& cta, const Pair<T, S>& row, const Context& context) {
  constexpr int N = Pair<T, S>::N;
  Shared& s = cta.s;
  const FastContext c(context);
  const float nats = c.template nats<S>();
  constexpr double unit = FastContext::unit<S>();
  const float outside = c.outside == -SVDK_INF ? 0.0f : static_cast<float>(context.penalty / unit);
  unsigned long long greedy = 0;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    Partition part{-SVDK_INF, 0.0f, 0, 0, 0};
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int at, int n, const float (&w)[N], const float (&y)[N]) {
                  float z[N], move[N], top = -SVDK_INF, pivot = 0.0f;
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    const bool inside = w[e] >= c.from;
                    move[e] =
                        inside ? c.template delta<S>(w[e], S == kNone ? 0.0f : y[e]) : outside;
                    z[e] = e < n ? c.template steered_by<S>(w[e], move[e]) : -SVDK_INF;
                    if (z[e] > top) {
                      top = z[e];
                      pivot = move[e];
                    }
                    if (inside && z[e] > -SVDK_INF) {
                      const unsigned long long key = best_key(z[e], at + e);
                      if (key > greedy) greedy = key;
                    }
                  }
                  if (top == -SVDK_INF) return;
                  if (top > part.top) part.rise(top, pivot, nats);
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    const double x = fast_exp((z[e] - part.top) * nats);
                    const double d = static_cast<double>(move[e]) - part.pivot;
                    part.z += x;
                    part.first += x * d;
                    part.second += x * d * d;
                  }
                });
    part = warp_total(part, nats);
    if (lane_id() == 0) {
      WarpSums& to = s.part.sums[slice][warp_id()];
      to.v[0] = part.top;
      to.v[1] = part.pivot;
      to.d[1] = part.z;
      to.d[2] = part.first;
      to.d[3] = part.second;
    }
  }
  greedy = block_max(s, greedy);
  if (threadIdx.x == 0) s.part.best = greedy;

  const Parts parts = cta.own_parts();
  cta.team_barrier();
  Partition all{-SVDK_INF, 0.0f, 0, 0, 0};
  const int entries = cta.slices.count * kWarps;
  SVDK_ROLLED
  for (int e = lane_id(); e < entries; e += 32) {
    const WarpSums& x = cta.entry(parts, e);
    Partition part{x.v[0], x.v[1], x.d[1], x.d[2], x.d[3]};
    if (part.top == -SVDK_INF) continue;
    if (part.top > all.top) {
      all.rise(part.top, part.pivot, nats);
    } else {
      part.rise(all.top, all.pivot, nats);
    }
    all.add(part);
  }
  all = warp_total(all, nats);
  SVDK_ROLLED
  for (int r = 0; r < parts.count; ++r) {
    if (parts.at(r).best > greedy) greedy = parts.at(r).best;
  }
  cta.team_barrier();
  const double m = all.first / all.z;
  return {all.top, static_cast<double>(logf(static_cast<float>(all.z))), (all.pivot + m) * unit,
          fmax(all.second / all.z - m * m, 0.0) * unit * unit, greedy};
}

// The log-probability of a token that scored `z`: never above 0, since both were rounded alike.
template <int S>
SVDK_DEVICE double log_share(const Summary& x, const FastContext& c, float z) {
  if (z == -SVDK_INF) return -static_cast<double>(SVDK_INF);
  return (static_cast<double>(z) - x.top) * c.template nats<S>() - x.log_z;
}

}  // namespace svdk::cuda
