// Steps 7 to 9 by sweeps over a whole row, once its constants are known: for rows whose tokens in
// play are more than the candidates that are kept. Done by all CTAs of the row together.
#pragma once
#include "candidates.cuh"
#include "read.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "sweep.cuh"
#include "team.cuh"

namespace svdk::cuda {

// Log of the mass outside C relative to that of the likeliest token; -inf for none. Summed about
// its own maximum: a strength can bring back what would underflow next to the tokens of C. By all
// CTAs of the row.
template <typename T, int S>
SVDK_DEVICE double log_outside(Cta& cta, const Operands<T, S>& row, const Constants& c) {
  constexpr int N = Operands<T, kNone>::N;
  const float from = inside_from(c.max_w, c.log_alpha);
  const Operands<T, kNone> warm = warm_only(row);
  RowShared& s = cta.s;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    float top = -kFloatInf;
    double sum = 0;
    for_vectors(warm, cta.begin(slice), cta.end(slice),
                [&](int, int n, const float (&w)[N], const float (&)[N]) {
                  float high = top;
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (e < n && w[e] < from) high = fmaxf(high, w[e]);
                  }
                  if (high == -kFloatInf) return;
                  sum *= top == -kFloatInf ? 0.0f : fast_exp(top - high);
                  top = high;
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (e < n && w[e] < from) sum += fast_exp(w[e] - top);
                  }
                });
    const float high = warp_reduce(top, Max());
    sum = warp_reduce(top == -kFloatInf ? 0.0 : sum * fast_exp(top - high), Sum());
    if (lane_id() == 0) s.part.sums[slice][warp_id()].mass = {high, sum};
  }
  const Parts parts = cta.own_parts();
  cta.team_barrier();
  const double top =
      reduce_over(cta.entries(), -kInf, [&](int e) { return cta.entry(parts, e).mass.max; }, Max());
  const double sum = reduce_over(
      cta.entries(), 0.0,
      [&](int e) {
        const MassSum& x = cta.entry(parts, e).mass;
        return x.sum > 0 ? x.sum * fast_exp(static_cast<float>(x.max - top)) : 0.0;
      },
      Sum());
  cta.team_barrier();
  return (top - c.max_w) + Math::log(sum);
}

// Token by token: whole vectors and sums in double together take too many registers.
template <typename T, int S>
SVDK_DEVICE MomentSums sum_row(Cta& cta, const Operands<T, S>& row, const Constants& constants,
                               double pivot) {
  const FastConstants c(constants);
  constexpr double unit = FastConstants::unit<S>();
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    MomentSums m = MomentSums::none();
    SVDK_UNROLL4
    for (int i = cta.begin(slice) + thread_id(); i < cta.end(slice); i += kThreads) {
      const float w = read_one(row.warm, i), other = other_at(row, i);
      if (w >= c.from) m.add(c.p_of(c.shrunk(w)), c.template delta_of<S>(w, other) * unit, pivot);
    }
    leave_sums(cta.s, slice, {{m.mass, m.first, m.second, m.norm2}});
  }
  const FourSums total = team_sum(cta);
  return {total.x[0], total.x[1], total.x[2], total.x[3]};
}

// Step 7: over the candidates, by their CTA alone, or (n < 0) over the whole row, by all CTAs of
// it.
template <typename T, int S>
SVDK_DEVICE Moments moments_of(Cta& cta, const Operands<T, S>& row, const Constants& c, int n) {
  RowShared& s = cta.s;
  const bool whole = n < 0;
  const int size = cta.size;
  if (!whole) cta.size = 1;  // the others wait
  double pivot = whole ? 0.0 : pivot_of_candidates<S>(s, n);
  if (whole && S == kVectorRow) pivot = other_at(row, fallback_token(s, row, cta.vocab));
  const MomentSums sums = whole ? sum_row(cta, row, c, pivot) : sum_candidates<S>(s, c, n, pivot);
  const bool everything = whole ? c.log_alpha < -DBL_MAX : n == c.n_finite;
  // With a pivot, the mass outside C has a part in the sums: what lacks to 1, or summed on its own
  // where so little is left that rounding could matter.
  double total = 1, outside = 0;
  if (S == kVectorRow) {
    outside = everything ? 0.0 : 1 - sums.mass;
    if (!everything && outside < 0.03) {
      outside = Math::exp(log_outside(cta, row, c) - c.log_zw);
    }
    total = sums.mass + outside;
  }
  cta.size = size;
  return sums.moments(pivot, outside, total);
}

// Steps 7 and 8: mu, into the constants of every CTA of the row. `n`: candidates of C, or -1.
template <typename T, int S>
SVDK_DEVICE void set_strength(Cta& cta, const Operands<T, S>& row, int n) {
  const RowParameters& p = cta.s.parameters;
  Constants& c = cta.s.broadcast.constants;
  double mu = p.strength;
  if (p.mode != kConstant) {
    Moments m{0, 0, 0};
    if (n < 0 || cta.leads()) m = moments_of(cta, row, c, n);
    mu = strength_of(p, m, p.mode == kLabel ? delta_at(row, c, static_cast<int>(p.label)) : 0);
  }
  const bool told = p.mode != kConstant && n >= 0;  // by the first CTA, perhaps by now
  if (threadIdx.x == 0 && (cta.leads() || !told)) c.mu = mu;
  if (told) {
    cta.broadcast();
  } else {
    __syncthreads();
  }
}

// What the curves of a strength need of a row. `max` is less max_w and in FastConstants' units.
struct RowPartition {
  float max;
  double log_z, mean, variance;
  BestKey greedy;  // argmax over C
};

SVDK_DEVICE Partition warp_total(Partition x, float nats) {
  const float max = warp_reduce(x.max, Max());
  const float pivot = warp_reduce(x.max == max ? x.pivot : -kFloatInf, Max());
  if (max == -kFloatInf) return {max, 0.0f, 0, 0, 0};
  x.rescale(max, pivot, nats);
  return {max, pivot, warp_reduce(x.z, Sum()), warp_reduce(x.first, Sum()),
          warp_reduce(x.second, Sum())};
}

template <typename T, int S>
SVDK_DEVICE RowPartition partition_of(Cta& cta, const Operands<T, S>& row,
                                      const Constants& constants) {
  constexpr int N = Operands<T, S>::N;
  RowShared& s = cta.s;
  const FastConstants c(constants);
  const float nats = c.template nats<S>();
  constexpr double unit = FastConstants::unit<S>();
  const float outside =
      c.outside == -kFloatInf ? 0.0f : static_cast<float>(constants.penalty / unit);
  BestKey greedy = 0;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    Partition part;
    part.clear();
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int at, int n, const float (&w)[N], const float (&y)[N]) {
                  float z[N], move[N], top = -kFloatInf, pivot = 0.0f;
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    const bool inside = w[e] >= c.from;
                    move[e] =
                        inside ? c.template delta_of<S>(w[e], S == kNone ? 0.0f : y[e]) : outside;
                    z[e] = e < n ? c.template steered_by<S>(w[e], move[e]) : -kFloatInf;
                    if (z[e] > top) {
                      top = z[e];
                      pivot = move[e];
                    }
                    if (inside && z[e] > -kFloatInf) {
                      greedy = Better()(greedy, best_key(z[e], at + e));
                    }
                  }
                  if (top == -kFloatInf) return;
                  if (top > part.max) part.rescale(top, pivot, nats);
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    part.add(fast_exp((z[e] - part.max) * nats), move[e]);
                  }
                });
    part = warp_total(part, nats);
    if (lane_id() == 0) s.part.sums[slice][warp_id()].partition = part;
  }
  greedy = block_reduce(s.slots, greedy, Better());
  if (threadIdx.x == 0) s.part.best = greedy;

  const Parts parts = cta.own_parts();
  cta.team_barrier();
  Partition all;
  all.clear();
  SVDK_ROLLED
  for (int e = lane_id(); e < cta.entries(); e += 32) {
    Partition part = cta.entry(parts, e).partition;
    if (part.max == -kFloatInf) continue;
    if (part.max > all.max) {
      all.rescale(part.max, part.pivot, nats);
    } else {
      part.rescale(all.max, all.pivot, nats);
    }
    all.z += part.z;
    all.first += part.first;
    all.second += part.second;
  }
  all = warp_total(all, nats);
  greedy =
      reduce_over(parts.count, greedy, [&](int rank) { return parts.at(rank).best; }, Better());
  cta.team_barrier();
  return {all.max, Math::log(all.z), all.mean() * unit, all.variance() * unit * unit, greedy};
}

// The log-probability of a token that scored `z`: never above 0, since both were rounded alike.
template <int S>
SVDK_DEVICE double log_share(const RowPartition& x, const FastConstants& c, float z) {
  if (z == -kFloatInf) return -kInf;
  return (static_cast<double>(z) - x.max) * c.template nats<S>() - x.log_z;
}

}  // namespace svdk::cuda
