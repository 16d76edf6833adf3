// Step 11 by a sweep over a whole row, by all CTAs of it: the masses of its slices, of which the
// row's uniform picks one, and that slice is read again. Greedy rows need the argmax alone.
#pragma once
#include "read.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "team.cuh"

namespace svdk::cuda {

// What a draw from a whole row needs beside the operands and constants.
struct Draw {
  Filter filter;
  float rate;  // from steered logits to nats over the temperature
  bool greedy;
  double uniform;

  SVDK_DEVICE void set(const Parameters& p, float nats) {
    greedy = p.greedy();
    rate = static_cast<float>(fmin(nats / p.temperature, static_cast<double>(FLT_MAX)));
    uniform = row_uniform(p.seed, p.offset);
  }
};

// The steered logits of a vector that may be drawn, -inf for the others.
template <int S, int N>
SVDK_DEVICE float drawable(const FastConstants& c, const Filter& filter, int at,
                           const float (&w)[N], const float (&y)[N], float (&z)[N]) {
  float top = -kFloatInf;
  SVDK_UNROLL
  for (int e = 0; e < N; ++e) {
    z[e] = c.template steered_logit<S>(w[e], S == kNone ? 0.0f : y[e]);
  }
  // Past the end of the row logits are read as -inf, and so they stay.
  if (filter.filters()) {
    SVDK_UNROLL
    for (int e = 0; e < N; ++e) {
      if (!filter.keeps(z[e], at + e)) z[e] = -kFloatInf;
    }
  }
  SVDK_UNROLL
  for (int e = 0; e < N; ++e) {
    top = fmaxf(top, z[e]);
  }
  return top;
}

// Of the slices of this CTA: the masses into part.sums, the best token into part.best; exceptional
// tokens are noted on the way.
template <typename T, int S>
SVDK_DEVICE void draw_row(Cta& cta, const Operands<T, S>& row, const Constants& constants,
                          const Draw& draw) {
  constexpr int N = Operands<T, S>::N;
  RowShared& s = cta.s;
  const FastConstants c(constants);
  const Filter filter = draw.filter;
  const float rate = draw.rate;
  const bool greedy = draw.greedy;
  Exceptional exceptional{0, 0};
  BestKey best = 0;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    float max = -kFloatInf, sum = 0.0f;
    for_vectors<Operands<T, S>::kUnroll>(
        row, cta.begin(slice), cta.end(slice),
        [&](int at, int n, const float (&w)[N], const float (&y)[N]) SVDK_INLINED {
          float z[N], probe = 0.0f;
          SVDK_UNROLL
          for (int e = 0; e < N; ++e) {
            probe = nonfinite_probe<S>(w[e], S == kNone ? 0.0f : y[e], probe);
          }
          if (!is_finite(probe)) {
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              if (e < n) exceptional.look_at<S>(w[e], S == kNone ? 0.0f : y[e]);
            }
          }
          const float top = drawable<S>(c, filter, at, w, y, z);
          if (top == -kFloatInf) return;
          if (greedy) {
            if (top < max) return;  // ties go to the lower id, which may be another thread's
            max = top;
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              if (z[e] == top) best = Better()(best, best_key(top, at + e));
            }
            return;
          }
          if (top > max) {
            sum *= max == -kFloatInf ? 0.0f : fast_exp((max - top) * rate);
            max = top;
          }
          SVDK_UNROLL
          for (int e = 0; e < N; ++e) sum += fast_exp((z[e] - max) * rate);
        });
    if (greedy) continue;
    const float high = warp_reduce(max, Max());
    const double mass = warp_reduce(
        max == -kFloatInf ? 0.0 : static_cast<double>(sum * fast_exp((max - high) * rate)), Sum());
    if (lane_id() == 0) s.part.sums[slice][warp_id()].mass = {high, mass};
  }
  leave_exceptional(s, exceptional);
  best = block_reduce(s.slots, best, Better());
  if (threadIdx.x == 0) s.part.best = best;
}

// Beside the row's largest, a mass that no uniform of 53 bits can land in.
constexpr double kNoMass = 0x1p-90;

// Where a draw lands: in which slice, and after which share of its mass.
struct Landing {
  float max;  // the largest steered logit of the row
  int slice;
  double share;
};

// From the masses of all slices, in their order; the last one with mass where rounding leaves none.
SVDK_DEVICE Landing land(const Cta& cta, const Parts& parts, const Draw& draw) {
  const float max = static_cast<float>(reduce_over(
      cta.entries(), -kInf, [&](int e) { return cta.entry(parts, e).mass.max; }, Max()));
  // Eight lanes hold the warps of a slice, and four slices are added up at a time.
  static_assert(kWarps == 8, "a slice has one entry a warp");
  double masses[kMaxSlices / 4], all = 0;
  SVDK_UNROLL
  for (int k = 0; k < kMaxSlices / 4; ++k) {
    const int e = k * 32 + lane_id();
    double mass = 0;
    if (e < cta.entries()) {
      const MassSum& x = cta.entry(parts, e).mass;
      if (x.sum > 0) mass = x.sum * fast_exp((static_cast<float>(x.max) - max) * draw.rate);
    }
    for (int distance = 1; distance < 8; distance <<= 1) mass += from_lane_xor(mass, distance);
    masses[k] = mass;
    for (int i = 0; i < 4; ++i) all += from_lane(mass, 8 * i);
  }
  const double target = draw.uniform * all;
  Landing found{max, -1, 0};
  double before = 0;
  SVDK_UNROLL
  for (int k = 0; k < kMaxSlices / 4; ++k) {
    for (int i = 0; i < 4; ++i) {
      const double mass = from_lane(masses[k], 8 * i);
      // The target is behind this slice's start: it is in the slice, or the last so far before it.
      if (mass > kNoMass && target >= before) {
        found.slice = 4 * k + i;
        found.share = (target - before) / mass;
      }
      before += mass;
    }
  }
  return found;
}

// The token there. By one CTA, which reads the slice again, warp by warp in order of id: first for
// the masses of its chunks, then the chunk that it is in.
template <typename T, int S>
SVDK_DEVICE int token_at(Cta& cta, const Operands<T, S>& row, const Constants& constants,
                         const Draw& draw, const Landing& landing) {
  constexpr int N = Operands<T, S>::N;
  RowShared& s = cta.s;
  const FastConstants c(constants);
  const int chunk = cta.slices.length / kWarps;
  const int end = cta.end(landing.slice);
  // The masses of the vector at `at` into m; their sum.
  const auto masses_at = [&](int at, int stop, float (&m)[N]) {
    float w[N], y[N], z[N];
    for (int e = 0; e < N; ++e) m[e] = 0.0f;
    if (at >= stop) return 0.0;
    read_vector(row, at, w, y);
    drawable<S>(c, draw.filter, at, w, y, z);
    double sum = 0;
    SVDK_UNROLL
    for (int e = 0; e < N; ++e) {
      m[e] = z[e] == -kFloatInf ? 0.0f : fast_exp((z[e] - landing.max) * draw.rate);
      sum += m[e];
    }
    return sum;
  };
  float m[N];
  double mine = 0;
  int from = cta.begin(landing.slice) + warp_id() * chunk;
  int stop = from + chunk < end ? from + chunk : end;
  SVDK_ROLLED
  for (int at = from + lane_id() * N; at < stop; at += 32 * N) mine += masses_at(at, stop, m);
  mine = warp_reduce(mine, Sum());
  double* const chunks = s.slots.of<double>();
  if (lane_id() == 0) chunks[warp_id()] = mine;
  __syncthreads();
  double all = 0, before = 0, start = 0;
  for (int i = 0; i < kWarps; ++i) all += chunks[i];
  const double target = landing.share * all;
  int in = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (chunks[i] > 0 && target >= before) {
      in = i;
      start = before;
    }
    before += chunks[i];
  }
  __syncthreads();
  if (warp_id() == 0) {
    from = cta.begin(landing.slice) + in * chunk;
    stop = from + chunk < end ? from + chunk : end;
    int token = -1;  // of this lane: the first behind the target, else its last with mass
    bool behind = false;
    SVDK_ROLLED
    for (int tile = from; tile < stop && !behind; tile += 32 * N) {
      const int at = tile + lane_id() * N;
      const double sum = masses_at(at, stop, m);
      double until = sum;
      for (int distance = 1; distance < 32; distance <<= 1) {
        const double below = from_lane_below(until, distance);
        if (lane_id() >= distance) until += below;
      }
      double reached = start + (until - sum);
      bool here = false;
      SVDK_UNROLL
      for (int e = 0; e < N; ++e) {
        reached += m[e];
        if (!here && m[e] > 0.0f) {
          token = at + e;
          here = reached > target;
        }
      }
      start += from_lane(until, 31);
      // The first lane that is behind the target has the token.
      const int first = warp_first(here);
      behind = first < 32;
      if (behind) token = from_lane(token, first);
    }
    if (!behind) token = static_cast<int>(warp_max(static_cast<uint32_t>(token + 1))) - 1;
    if (lane_id() == 0) s.token = token;
  }
  __syncthreads();
  return s.token;
}

}  // namespace svdk::cuda
