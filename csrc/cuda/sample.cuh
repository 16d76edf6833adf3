// steered_sample: one launch, one or more CTAs a row, all twelve steps. Where the tokens in play
// are few, the first CTA finishes with the candidates; else all CTAs go on with sweeps of the whole
// row. A direct draw makes do with one sweep and its masses.
#pragma once
#include "candidates.cuh"
#include "draw_sweep.cuh"
#include "filters.cuh"
#include "full_sweep.cuh"
#include "steering.cuh"
#include "sweep.cuh"
#include "team.cuh"

namespace svdk::cuda {

struct SampleShared {
  RowShared row;
  Search search;
  Draw draw;
  union {
    CandidateScratch candidates;
    Histogram bins;
  } scratch;
};

// What a direct draw needs: no sums, everything in C.
SVDK_DEVICE Constants direct_constants(const BatchArgs& a, double mu) {
  Constants c{};
  c.direction = a.direction;
  c.inside_from = -FLT_MAX;
  c.mu = mu;
  c.penalty = a.parameters.penalty;
  return c;
}

// Logits, in nats, next to which the rounding of a float shows where they are not taken relative to
// their maximum.
constexpr float kLoud = 8192.0f;

// Step 11 of the whole row, from what the sweeps of all CTAs left; the token, or -1 if a direct
// draw cannot tell. Only the first CTA knows which; for the others it is 0.
template <typename T, int S>
SVDK_DEVICE int finish_draw(Cta& cta, const Operands<T, S>& row, const Parts& parts,
                            const Draw& draw, bool direct, bool& invalid) {
  const BestKey best =
      reduce_over(parts.count, BestKey{0}, [&](int rank) { return parts.at(rank).best; }, Better());
  const Exceptional found = reduce_over(
      parts.count, Exceptional{0, 0}, [&](int rank) { return parts.at(rank).exceptional; }, Sum());
  const Landing landing = draw.greedy ? Landing{0.0f, -1, 0} : land(cta, parts, draw);
  cta.team_barrier();
  const Constants& c = cta.s.broadcast.constants;
  if (direct) {
    invalid = found.flags & kInvalid || found.warm_masked == cta.vocab;
    if (invalid) return -1;
    // A masked base token does not get the shift that the others get. And a large shift, or a large
    // logit, rounds away what is added to it, as long as it is not taken relative to the maxima.
    const float nats = FastConstants(c).template nats<S>();
    const bool loud = S != kNone && !draw.greedy && fabsf(landing.max) * nats > kLoud;
    if (found.flags & (kBaseMasked | kFarApart) || loud) return -1;
  }
  if (draw.greedy) return best_id(best);
  return cta.leads() ? token_at(cta, row, c, draw, landing) : 0;
}

// The log-probability of the token, from a sweep of the whole row; in the first CTA.
template <typename T, int S>
SVDK_DEVICE double steered_log_p(Cta& cta, const Operands<T, S>& row, int token) {
  const Constants& c = cta.s.broadcast.constants;
  if (S == kNone) return cta.leads() ? c.log_p_of(read_one(row.warm, token)) : 0.0;
  const RowPartition x = partition_of(cta, row, c);
  if (!cta.leads()) return 0;
  const FastConstants fast(c);
  const float w = read_one(row.warm, token);
  return log_share<S>(x, fast, fast.template steered_logit<S>(w, other_at(row, token)));
}

struct SampleOutcome {
  int token, status, candidates;
  double strength, kl, steered, warm, base;
};

SVDK_DEVICE void write_sample(const SampleArgs& a, int row, const SampleOutcome& x) {
  if (threadIdx.x != 0) return;
  a.token[row] = x.token;
  if (!a.floats) return;
  const int64_t plane = a.rows.batch;
  a.floats[row] = static_cast<float>(x.strength);
  a.floats[plane + row] = static_cast<float>(x.kl);
  a.floats[2 * plane + row] = static_cast<float>(x.steered);
  a.floats[3 * plane + row] = static_cast<float>(x.warm);
  a.floats[4 * plane + row] = static_cast<float>(x.base);
  a.ints[row] = x.candidates;
  a.ints[plane + row] = x.status;
}

template <typename T, int S>
SVDK_DEVICE void refuse(const SampleArgs& a, Cta& cta, const Operands<T, S>& row, bool readable) {
  const int token = readable ? fallback_token(cta.s, row, cta.vocab) : 0;
  write_sample(a, cta.row, {token, kInvalid, 0, kNaN, kNaN, kNaN, kNaN, kNaN});
}

// Step 12.
template <typename T, int S>
SVDK_DEVICE void describe(const SampleArgs& a, Cta& cta, const Operands<T, S>& row, int token,
                          double steered) {
  if (threadIdx.x != 0) return;
  const Constants& c = cta.s.broadcast.constants;
  const float w = read_one(row.warm, token);
  const float other = a.floats ? other_at(row, token) : 0.0f;
  constexpr bool base = S == kBase;
  write_sample(a, cta.row,
               {token, cta.s.sums.exceptional.flags & kBaseMasked, c.n_inside, c.mu,
                base ? c.kl : kNaN, steered, c.log_p_of(w), base ? c.log_q_of(other) : kNaN});
}

template <typename T, int S>
SVDK_DEVICE void sample_row(const SampleArgs& a, SampleShared& s) {
  Cta cta(s.row, a.rows);
  Operands<T, S> row{};
  const RowParameters& p = s.row.parameters;
  const Broadcast& found = s.row.broadcast;
  Constants& c = s.row.broadcast.constants;
  load_parameters(s.row, a.rows, cta.row);
  const Readable readable = open_operands(a.rows, cta.row, row);
  bool invalid = !p.valid || readable != kBoth;
  // Plain sampling, and steering whose direction needs nothing of the row but a constant shift: the
  // token is found in the first sweep.
  bool direct = p.log_alpha < -DBL_MAX && !p.has_filters() && p.mode == kConstant &&
                a.rows.direction != kKlGradient;
  int token = -1;
  double steered = 0;  // log-probability of the token
  while (!invalid) {
    if (threadIdx.x == 0) {
      s.search.filter = Filter::none();
      s.search.total = -1;
    }
    int n = -1;             // candidates to draw from; -1: the whole row
    bool complete = false;  // they are all that can be drawn, before filters
    if (direct) {
      if (threadIdx.x == 0) c = direct_constants(a.rows, p.strength);
      clear_part(s.row);
    } else {
      Candidate* unordered = s.scratch.candidates.unordered;
      if (!open_row(cta, a.rows, row, unordered)) return;
      invalid = found.next == kRefuse;
      if (invalid) break;
      const int in_c = found.n_candidates;
      if (token < 0 && in_c >= 0 && (c.drops_outside() || in_c == c.n_finite)) {
        if (!cta.leads()) return;
        cta.go_alone();
        n = in_c;
        complete = true;
      } else {
        cta.team_barrier();  // what was broadcast has been read
        if (threadIdx.x == 0) c.inside_from = inside_from(c.max_w, c.log_alpha);
        __syncthreads();
      }
      set_strength(cta, row, in_c);
      if (token < 0 && n < 0 && p.has_filters() &&
          filter_row(cta, row, c, p, s.scratch.bins, s.search)) {
        n = cta.leads() ? compact(cta, cta.own_parts(), c, unordered, true) : 0;
        cta.team_barrier();
      }
    }

    // Steps 9 to 11.
    if (n >= 0) {
      if (cta.leads()) {
        const LogSum sum = steer_candidates(s.row, s.scratch.candidates, c, n);
        token = draw_candidates(s.row, s.scratch.candidates, p, n, sum.top, s.search.total);
        if (complete && a.floats) {
          const float w = read_one(row.warm, token);
          steered = (c.steered_logit(w, other_at(row, token)) - sum.top) - sum.log_sum;
        }
      }
    } else if (token < 0) {
      if (threadIdx.x == 0) {
        s.draw.set(p, FastConstants(c).template nats<S>());
        s.draw.filter = s.search.filter;
      }
      __syncthreads();
      draw_row(cta, row, c, s.draw);
      Parts parts = cta.own_parts();
      if (direct) {
        if (!publish(cta, a.rows, parts)) return;
      } else {
        cta.team_barrier();
      }
      token = finish_draw(cta, row, parts, s.draw, direct, invalid);
    }
    if (direct && !invalid && (token < 0 || a.floats)) {
      direct = false;  // once more, for what the direct draw could not know
      continue;
    }
    if (a.floats && !direct && (S == kNone || !complete)) {
      steered = steered_log_p(cta, row, token);
    }
    break;
  }
  if (!cta.leads()) return;
  if (invalid) {
    refuse(a, cta, row, readable != kNothing);
  } else {
    describe(a, cta, row, token, steered);
  }
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) steered_sample_kernel(SampleArgs a) {
  SVDK_SHARED(SampleShared, s);
  sample_row<T, S>(a, s);
}

}  // namespace svdk::cuda
