// steered_sample: one launch, one or more CTAs a row.
#pragma once
#include "filters.cuh"

namespace svdk::cuda {

SVDK_DEVICE bool in_unit(double x) { return x >= 0 && x <= 1; }

// The natural logarithm of a row's alpha; that of the scalar comes from the host.
SVDK_DEVICE double log_alpha_of(const RowArgs& a, int row) {
  if (a.direction == kPlain) return -static_cast<double>(SVDK_INF);
  return a.alpha.rows ? log(a.alpha.at(row)) : a.log_alpha;
}
SVDK_DEVICE bool alpha_is_valid(const RowArgs& a, int row) {
  return a.direction == kPlain || in_unit(a.alpha.at(row));
}

// A row's parameters into shared memory, by thread 0.
SVDK_DEVICE void load_parameters(const SampleArgs& a, int row, SampleRow& p) {
  if (threadIdx.x == 0) {
    p.mode = a.mode;
    p.strength = a.strength.at(row);
    p.temperature = a.temperature.at(row);
    p.top_p = a.top_p.at(row);
    p.min_p = a.min_p.at(row);
    p.top_k = a.top_k.at(row);
    p.label = a.labels ? a.labels[row] : 0;
    p.seed = static_cast<uint64_t>(a.seed.at(row));
    p.offset = static_cast<uint64_t>(a.offset.at(row));
    p.log_alpha = log_alpha_of(a.rows, row);
    p.valid = is_finite(p.strength) && (p.mode != kKlBudget || p.strength >= 0) &&
              alpha_is_valid(a.rows, row) && is_finite(p.temperature) && p.temperature >= 0 &&
              in_unit(p.top_p) && in_unit(p.min_p) && p.top_k >= 0 &&
              (p.mode != kLabel || (p.label >= 0 && p.label < a.rows.vocab));
  }
  __syncthreads();
}

// What a direct draw needs: no sums, everything in C.
SVDK_DEVICE Context direct_context(const RowArgs& a, double mu) {
  Context c{};
  c.direction = a.direction;
  c.inside_from = -FLT_MAX;
  c.mu = mu;
  c.penalty = a.penalty;
  return c;
}

// The operands of a row; 0: both readable, 1: the second is not, 2: the warm row is not.
template <typename T, int S>
SVDK_DEVICE int open_pair(const RowArgs& a, int row, Pair<T, S>& pair) {
  const int64_t warm = a.warm.index ? a.warm.index[row] : row;
  if (warm < 0 || warm >= a.warm.limit) return 2;
  pair.warm = open_stream<T>(a.warm, warm, a.vocab);
  if (S == kNone) return 0;
  const int64_t other = a.other.index ? a.other.index[row] : row;
  if (other < 0 || other >= a.other.limit) return 1;
  pair.other = open_stream<typename Pair<T, S>::Other>(a.other, other, a.vocab);
  return 0;
}

struct Outcome {
  int token, status, candidates;
  double strength, kl, steered, warm, base;
};

SVDK_DEVICE void write_sample(const SampleArgs& a, int row, const Outcome& x) {
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
SVDK_DEVICE void refuse(const SampleArgs& a, Cta& cta, const Pair<T, S>& row, bool readable) {
  const int token = readable ? fallback_token(cta.s, row, cta.vocab) : 0;
  const double nan = SVDK_NAN;
  write_sample(a, cta.row, {token, kInvalid, 0, nan, nan, nan, nan, nan});
}

template <typename T, int S>
SVDK_DEVICE void report(const SampleArgs& a, int row, const Pair<T, S>& pair, const Context& c,
                        int token, double steered, int flags) {
  if (threadIdx.x != 0) return;
  const float w = read_one(pair.warm, token);
  const float other = a.floats ? other_at(pair, token) : 0.0f;
  const double nan = SVDK_NAN;
  const bool base = S == kBase;
  write_sample(a, row,
               {token, flags & kBaseMasked, c.inside, c.mu, base ? c.kl : nan, steered,
                log_p_of(c, w), base ? log_q_of(c, other) : nan});
}

// Adds the row up; true in every CTA that is to go on, with the first CTA's verdict. On kFinished
// the row is invalid. verdict.listed is the size of C if it fits the list (then it is there), or
// -1.
template <typename T, int S>
SVDK_DEVICE bool open_row(Cta& cta, const RowArgs& a, const Pair<T, S>& row, double log_alpha) {
  Shared& s = cta.s;
  const bool masked = log_alpha > -DBL_MAX;
  const bool collect = masked || cta.vocab <= kList;
  clear_part(s);
  first_sweep(cta, row, static_cast<float>(log_alpha), collect);
  Parts parts;
  if (!publish(cta, a, parts)) return false;
  int total = -1;
  for (bool first = true;; first = false) {
    if (cta.leads()) {
      if (first) merge_sums(cta, parts);
      const Context c = first ? make_context<S>(s, a, log_alpha) : s.verdict.context;
      const bool valid = !(s.sums.flags & kInvalid) && c.finite > 0;
      const bool look = first ? valid && collect : total <= kList;
      const int listed = look ? compact(cta, parts, c, !first) : -1;
      const bool again = first && valid && listed < 0 && (masked || c.finite <= kList);
      if (threadIdx.x == 0) {
        s.verdict.next = !valid ? kFinished : again ? kCollect : kWhole;
        s.verdict.listed = listed;
        if (first) s.verdict.context = c;
        if (listed >= 0 || !first) s.verdict.context.inside = first ? listed : total;
      }
    }
    cta.hand_out();
    if constexpr (S == kBase) {
      if (s.verdict.next != kFinished && first && !is_finite(s.verdict.context.kl)) {
        sum_in_double(cta, row);
      }
    }
    if (s.verdict.next != kCollect) return true;
    // Candidates were lost: the running maximum was low for too long, or C is large.
    total = collect_sweep(cta, row, inside_from(s.verdict.context.max_w, log_alpha));
    parts = cta.own_parts();
  }
}

// What the direct draws of all parts came to; the token, or -1 if the row must be opened after all.
SVDK_DEVICE int merge_direct(Cta& cta, const Parts& parts, bool& invalid) {
  unsigned long long best = 0;
  int dead = 0, flags = 0;
  SVDK_ROLLED
  for (int r = 0; r < parts.count; ++r) {
    const Part& part = parts.at(r);
    if (part.best > best) best = part.best;
    dead += part.dead;
    flags |= part.flags;
  }
  cta.team_barrier();
  invalid = flags & kInvalid || dead == cta.vocab;
  // A masked base token does not get the shift that the others get. And a large shift, or a large
  // score, rounds away what is added to it, as long as it is not taken relative to the maxima.
  const Noise& noise = cta.s.noise;
  const bool loud = !noise.greedy && fabsf(best_score(best)) * noise.per_unit() > kLoud;
  return flags & (kBaseMasked | kFar) || loud ? -1 : best_id(best);
}

template <typename T, int S>
SVDK_DEVICE void sample_row(const SampleArgs& a, Shared& s) {
  Cta cta(s, a.rows);
  Pair<T, S> row{};
  const SampleRow& p = s.sample;
  load_parameters(a, cta.row, s.sample);
  const int unreadable = open_pair(a.rows, cta.row, row);
  bool invalid = !p.valid || unreadable;
  // Plain sampling, and steering whose direction needs nothing of the row but a constant shift: the
  // token is found in the first sweep.
  bool direct = p.log_alpha < -DBL_MAX && !p.filtered() && p.mode == kConstant &&
                a.rows.direction != kKlGradient;
  int token = -1;
  double steered = 0;  // log-probability of the token
  Context& c = s.verdict.context;
  while (!invalid) {
    if (threadIdx.x == 0) {
      s.search.filter = {-SVDK_INF, kMaxId};
      s.search.total = -1;
    }
    int listed = -1;        // entries of the list to draw from
    bool complete = false;  // the list is all that can be drawn, before filters
    if (direct) {
      if (threadIdx.x == 0) c = direct_context(a.rows, p.strength);
      clear_part(s);
    } else {
      if (!open_row(cta, a.rows, row, p.log_alpha)) return;
      invalid = s.verdict.next == kFinished;
      if (invalid) break;
      const int in_list = s.verdict.listed;
      const bool drop = c.penalty < -DBL_MAX;
      if (token < 0 && in_list >= 0 && (drop || in_list == c.finite)) {
        if (!cta.leads()) return;
        cta.go_alone();
        listed = in_list;
        complete = true;
      } else {
        cta.team_barrier();  // the verdict has been read
        if (threadIdx.x == 0) c.inside_from = inside_from(c.max_w, c.log_alpha);
        __syncthreads();
      }
      double mu = p.strength;
      if (p.mode != kConstant) {
        Moments m{0, 0, 0};
        if (in_list < 0 || cta.leads()) m = moments_of(cta, row, c, in_list);
        mu = strength_of(p, m, p.mode == kLabel ? delta_at(row, c, static_cast<int>(p.label)) : 0);
      }
      if (threadIdx.x == 0) c.mu = mu;
      if (p.mode != kConstant && in_list >= 0) {
        cta.hand_out();
      } else {
        __syncthreads();
      }
      if (token < 0 && listed < 0 && p.filtered() && select(cta, row, c, p)) {
        listed = cta.leads() ? compact(cta, cta.own_parts(), c, true) : 0;
        cta.team_barrier();
      }
    }

    if (listed >= 0) {
      if (cta.leads()) {
        const LogSum sum = steer_list(s, c, listed);
        token = draw_list(s, p, listed, s.search.total);
        if (complete && a.floats) {
          const float w = read_one(row.warm, token);
          steered = (steered_of(c, c.mu, w, other_at(row, token)) - sum.top) - sum.log_sum;
        }
      }
    } else if (token < 0) {
      draw_sweep(cta, row, c, s.search.filter, p);
      if (direct) {
        Parts parts;
        if (!publish(cta, a.rows, parts)) return;
        token = merge_direct(cta, parts, invalid);
      } else {
        token = best_id(merge_best(cta));
      }
    }
    if (direct && !invalid && (token < 0 || a.floats)) {
      direct = false;  // once more, for what the direct draw could not know
      continue;
    }
    if (S == kNone) {
      if (cta.leads() && a.floats && !direct) steered = log_p_of(c, read_one(row.warm, token));
    } else if (a.floats && !complete && !direct) {
      const Summary x = whole_partition(cta, row, c);
      if (cta.leads()) {
        const FastContext fast(c);
        const float w = read_one(row.warm, token);
        steered = log_share<S>(x, fast, fast.template steered<S>(w, other_at(row, token)));
      }
    }
    break;
  }
  if (!cta.leads()) return;
  if (invalid) {
    refuse(a, cta, row, unreadable < 2);
  } else {
    report(a, cta.row, row, c, token, steered, s.sums.flags);
  }
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) steered_sample_kernel(SampleArgs a) {
  SVDK_SHARED(Shared, s);
  sample_row<T, S>(a, s);
}

}  // namespace svdk::cuda
