// Steps 2 to 5 of a row. 2: one sweep over its slices, reading each logit once, adds up both
// softmax denominators and sum p (w - b), and collects the candidates for C. 3: the slices' sums
// and the candidates are merged. 4: constants. 5: of the candidates, those in C; where some were
// lost, one more sweep for C alone. Also the token of a row that step 1 or 2 finds invalid.
#pragma once
#include "read.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "team.cuh"

namespace svdk::cuda {

// Exponents of 2 relative to the running maxima, made by one FMA a logit: w log2(e) - shift. A
// shift is rounded, so the powers are 2^rest times what they should be.
struct Powers {
  float shift_w, shift_b;
  float keep_w, keep_b;  // 2^-rest
  float to_nats, excess;

  SVDK_DEVICE void set(float max_w, float max_b) {
    shift_w = shift(max_w);
    shift_b = shift(max_b);
    const float rest_w = fmaf(max_w, kLog2e, -shift_w), rest_b = fmaf(max_b, kLog2e, -shift_b);
    keep_w = exp2_approx(-rest_w);
    keep_b = exp2_approx(-rest_b);
    to_nats = keep_w * kLn2;
    excess = to_nats * (rest_b - rest_w);
  }
  // NaN, and so a look at each token, where so much is rounded that a power could leave the range.
  SVDK_DEVICE static float shift(float max) {
    return fabsf(max) < 0x1p20f ? max * kLog2e : static_cast<float>(kNaN);
  }
};

// The sums of some vectors that are all there, if nothing in them is exceptional: the cross term
// (or the probe) is finite exactly then.
template <int S, int U, int N>
SVDK_DEVICE bool add_vectors(RunningSums& o, const Powers& powers, const float (&w)[U][N],
                             const float (&b)[U][N]) {
  float z = 0.0f, y = 0.0f, c = 0.0f;
  SVDK_UNROLL
  for (int u = 0; u < U; ++u) {
    SVDK_UNROLL
    for (int e = 0; e < N; ++e) {
      const float dw = fmaf(w[u][e], kLog2e, -powers.shift_w), ew = exp2_approx(dw);
      z += ew;
      if (S == kBase) {
        const float db = fmaf(b[u][e], kLog2e, -powers.shift_b);
        y += exp2_approx(db);
        c = fmaf(ew, dw - db, c);
      } else {
        c = nonfinite_probe<S>(w[u][e], b[u][e], c);
      }
    }
  }
  if (!is_finite(S == kBase ? c : c + z)) return false;
  o.z_w = fmaf(z, powers.keep_w, o.z_w);
  if (S == kBase) {
    o.usable = fmaf(z, powers.keep_w, o.usable);
    o.z_b = fmaf(y, powers.keep_b, o.z_b);
    o.cross = fmaf(z, powers.excess, fmaf(c, powers.to_nats, o.cross));
  }
  return true;
}

// Likewise of the first n tokens of a vector, whatever they are.
template <int S, int N>
SVDK_DEVICE void add_tokens(RunningSums& o, Exceptional& exceptional, const float (&w)[N],
                            const float (&b)[N], int n) {
  SVDK_UNROLL
  for (int e = 0; e < N; ++e) {
    if (e >= n) continue;
    exceptional.look_at<S>(w[e], b[e]);
    const float ew = w[e] > -kFloatInf ? fast_exp(w[e] - o.max_w) : 0.0f;
    o.z_w += ew;
    if (S == kBase && b[e] > -kFloatInf) {
      o.z_b += fast_exp(b[e] - o.max_b);
      o.usable += ew;
      if (ew > 0.0f) o.cross += ew * ((w[e] - o.max_w) - (b[e] - o.max_b));
    }
  }
}

// Leaves the warp's sums of a slice where merge_sums finds them.
SVDK_DEVICE void close_slice(RowShared& s, RunningSums& o, int slice) {
  const float max_w = warp_reduce(o.max_w, Max()), max_b = warp_reduce(o.max_b, Max());
  if (max_w != o.max_w || max_b != o.max_b) o.rescale(max_w, max_b);
  const float z_w = warp_reduce(o.z_w, Sum()), z_b = warp_reduce(o.z_b, Sum());
  const float usable = warp_reduce(o.usable, Sum()), cross = warp_reduce(o.cross, Sum());
  if (lane_id() == 0) {
    s.part.sums[slice][warp_id()].running = {max_w, max_b, z_w, z_b, usable, cross};
  }
}

// What a token must reach to be in C, were `top` the maximum; low enough to be safe of rounding.
SVDK_DEVICE float candidate_from(float top, float log_alpha) {
  const float from = top + log_alpha - 4e-7f * (fabsf(top) + fabsf(log_alpha));
  return fmaxf(from, -FLT_MAX);
}

// What candidates are measured against: the largest value that the CTA has met so far.
struct Threshold {
  float seen, bound;
  uint32_t key;  // of the running maximum that the bound is of

  SVDK_DEVICE void clear() {
    seen = -kFloatInf;
    bound = kFloatInf;
    key = 0;  // of no float
  }
  SVDK_DEVICE void raise(RowShared& s, float high, float log_alpha) {
    if (high > seen) {
      seen = high;
      atomicMax(&s.running, ordered_key(high));
    }
    const uint32_t now = read_shared(&s.running);
    if (now == key) return;
    key = now;
    seen = fmaxf(seen, key_value(now));
    bound = candidate_from(seen, log_alpha);
  }
};

// Step 2, for the slices of this CTA: their sums, and with `collect` the candidates within
// log_alpha of the running maximum, in no order. Ends without a barrier.
template <typename T, int S>
SVDK_DEVICE void first_sweep(Cta& cta, const Operands<T, S>& row, float log_alpha, bool collect) {
  constexpr int N = Operands<T, S>::N, U = Operands<T, S>::kUnroll, kStep = U * kThreads * N;
  using Other = typename Operands<T, S>::Other;
  RowShared& s = cta.s;
  RunningSums o;
  Powers powers;
  Threshold threshold;
  threshold.clear();
  Exceptional exceptional{0, 0};
  const int start = cta.begin(cta.first_slice());
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    o.clear();
    powers.set(o.max_w, o.max_b);
    const int end = cta.end(slice);
    SVDK_ROLLED
    for (int from = cta.begin(slice); from < end; from += kStep) {
      Lanes<T, N> w[U];
      Lanes<Other, N> other[U];
      const bool whole = fetch_vectors<U>(row, from, end, w, other);
      float x[U][N], y[U][N];
      SVDK_UNROLL
      for (int u = 0; u < U; ++u) {
        w[u].unpack(x[u]);
        if (S != kNone) other[u].unpack(y[u]);
      }
      const float top_w = top_of(w, x), top_b = S == kBase ? top_of(other, y) : -kFloatInf;
      if (collect) {
        // One maximum over the warp at the very start: alone, a thread's own lets too many in.
        threshold.raise(s, from == start ? warp_reduce(top_w, Max()) : top_w, log_alpha);
        if (top_w >= threshold.bound && read_shared(&s.part.count) <= kCapacity) {
          SVDK_UNROLL
          for (int u = 0; u < U; ++u) {
            const int at = from + (u * kThreads + thread_id()) * N;
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              if (x[u][e] >= threshold.bound) {
                s.part.add(at + e, x[u][e], S == kNone ? 0.0f : y[u][e]);
              }
            }
          }
        }
      }
      if (top_w > o.max_w || top_b > o.max_b) {
        o.rescale(fmaxf(o.max_w, top_w), fmaxf(o.max_b, top_b));
        powers.set(o.max_w, o.max_b);
      }
      if (whole && add_vectors<S>(o, powers, x, y)) continue;
      SVDK_UNROLL
      for (int u = 0; u < U; ++u) {
        const int at = from + (u * kThreads + thread_id()) * N, left = end - at;
        if (left >= N && w[u].all_masked() && (S == kNone || other[u].all_masked())) {
          exceptional.warm_masked += N;  // as most of a row that a grammar masks
        } else if (left > 0) {
          add_tokens<S>(o, exceptional, x[u], y[u], left < N ? left : N);
        }
      }
    }
    close_slice(s, o, slice);
  }
  leave_exceptional(s, exceptional);
}

// Step 3: the sums of the whole row, into s.sums. Called by the whole block.
SVDK_DEVICE void merge_sums(Cta& cta, const Parts& parts) {
  RowShared& s = cta.s;
  if (warp_id() == 0) {
    float max_w = -kFloatInf, max_b = -kFloatInf;
    SVDK_ROLLED
    for (int e = lane_id(); e < cta.entries(); e += 32) {
      const RunningSums& x = cta.entry(parts, e).running;
      max_w = fmaxf(max_w, x.max_w);
      max_b = fmaxf(max_b, x.max_b);
    }
    max_w = warp_reduce(max_w, Max());
    max_b = warp_reduce(max_b, Max());
    const FourSums sums = reduce_over(
        cta.entries(), FourSums{},
        [&](int e) -> FourSums {
          RunningSums x = cta.entry(parts, e).running;
          x.rescale(max_w, max_b);
          return {{x.z_w, x.z_b, x.usable, x.cross}};
        },
        Sum());
    const Exceptional exceptional = reduce_over(
        parts.count, Exceptional{0, 0}, [&](int rank) { return parts.at(rank).exceptional; },
        Sum());
    if (lane_id() == 0) {
      s.sums = {{max_w, max_b, sums.x[0], sums.x[1], sums.x[2], sums.x[3]}, exceptional};
    }
  }
  __syncthreads();
}

// K once more, in double, for a row whose logits take its terms out of the range of a float. By all
// CTAs of the row; nobody waits for such rows, so tokens are read one by one.
template <typename T>
SVDK_DEVICE void sum_in_double(Cta& cta, const Operands<T, kBase>& row) {
  Constants& c = cta.s.broadcast.constants;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    double cross = 0;
    SVDK_ROLLED
    for (int i = cta.begin(slice) + thread_id(); i < cta.end(slice); i += kThreads) {
      const float w = read_one(row.warm, i), b = read_one(row.other, i);
      const float p = fast_exp(w - c.max_w);
      if (p == 0.0f || b == -kFloatInf) continue;
      cross += p * ((static_cast<double>(w) - c.max_w) - (static_cast<double>(b) - c.max_b));
    }
    leave_sums(cta.s, slice, {{cross, 0, 0, 0}});
  }
  const double cross = team_sum(cta).x[0];
  if (cta.leads() && threadIdx.x == 0) {
    Sums sums = cta.s.sums;
    sums.cross = cross;
    c.kl = kl_divergence(sums, c.log_zw, c.log_zb);
  }
  cta.broadcast();
}

// Steps 3 and 5: the candidates of all parts that are in C (all of them with `everything`), into
// this CTA's part, in order of id. Returns how many, or -1 when some were lost or they are more
// than kCapacity.
SVDK_DEVICE int compact(Cta& cta, const Parts& parts, const Constants& c, Candidate* unordered,
                        bool everything) {
  RowShared& s = cta.s;
  if (threadIdx.x == 0) s.n_candidates = 0;
  __syncthreads();
  bool overflow = false;
  SVDK_ROLLED
  for (int r = 0; r < parts.count; ++r) {
    const Part& part = parts.at(r);
    if (part.overflow()) {
      overflow = true;
      continue;
    }
    const int count = static_cast<int>(part.count);
    SVDK_ROLLED
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Candidate candidate = part.candidates[i];
      if (!everything && !c.in_confidence_set(candidate.warm)) continue;
      const uint32_t place = atomicAdd(&s.n_candidates, 1u);
      if (place < static_cast<uint32_t>(kCapacity)) unordered[place] = candidate;
    }
  }
  __syncthreads();
  const int n = static_cast<int>(s.n_candidates);
  if (overflow || n > kCapacity) return -1;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const Candidate candidate = unordered[i];
    int place = 0;
    SVDK_ROLLED
    for (int j = 0; j < n; ++j) place += unordered[j].id < candidate.id;
    s.part.candidates[place] = candidate;
  }
  __syncthreads();
  return n;
}

// A sweep for the tokens of C alone, now that its threshold is known. part.count is their number,
// even beyond kCapacity. Returns the number in the whole row.
template <typename T, int S>
SVDK_DEVICE int collect_sweep(Cta& cta, const Operands<T, S>& row, float from) {
  constexpr int N = Operands<T, S>::N;
  RowShared& s = cta.s;
  if (threadIdx.x == 0) s.part.count = 0;
  __syncthreads();
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int at, int n, const float (&w)[N], const float (&y)[N]) {
                  uint32_t hits = 0;
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) hits += e < n && w[e] >= from;
                  if (hits == 0) return;
                  uint32_t place = atomicAdd(&s.part.count, hits);
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (!(e < n && w[e] >= from)) continue;
                    if (place < static_cast<uint32_t>(kCapacity)) {
                      s.part.candidates[place] = {at + e, w[e], S == kNone ? 0.0f : y[e]};
                    }
                    ++place;
                  }
                });
  }
  return team_reduce(cta, 0, [](const Part& x) { return static_cast<int>(x.count); }, Sum());
}

// Steps 2 to 5. True in every CTA that is to go on, with what the first CTA found out in
// s.broadcast: on kRefuse the row is invalid.
template <typename T, int S>
SVDK_DEVICE bool open_row(Cta& cta, const BatchArgs& a, const Operands<T, S>& row,
                          Candidate* unordered) {
  RowShared& s = cta.s;
  const double log_alpha = s.parameters.log_alpha;
  const bool masks = log_alpha > -DBL_MAX;
  const bool collect = masks || cta.vocab <= kCapacity;
  clear_part(s);
  first_sweep(cta, row, s.parameters.fast_log_alpha, collect);
  Parts parts;
  if (!publish(cta, a, parts)) return false;
  int total = -1;
  for (bool first = true;; first = false) {
    if (cta.leads()) {
      if (first) merge_sums(cta, parts);
      const Constants c = first ? make_constants<S>(s.sums, a, log_alpha) : s.broadcast.constants;
      const bool valid = !(s.sums.exceptional.flags & kInvalid) && c.n_finite > 0;
      const bool look = first ? valid && collect : total <= kCapacity;
      const int n = look ? compact(cta, parts, c, unordered, !first) : -1;
      const bool again = first && valid && n < 0 && (masks || c.n_finite <= kCapacity);
      if (threadIdx.x == 0) {
        s.broadcast.next = !valid ? kRefuse : again ? kCollect : kGoOn;
        s.broadcast.n_candidates = n;
        if (first) s.broadcast.constants = c;
        if (n >= 0 || !first) s.broadcast.constants.n_inside = first ? n : total;
      }
    }
    cta.broadcast();
    if constexpr (S == kBase) {
      if (s.broadcast.next != kRefuse && first && !is_finite(s.broadcast.constants.kl)) {
        sum_in_double(cta, row);
      }
    }
    if (s.broadcast.next != kCollect) return true;
    // Candidates were lost: the running maximum was low for too long, or C is large.
    total = collect_sweep(cta, row, inside_from(s.broadcast.constants.max_w, log_alpha));
    parts = cta.own_parts();
  }
}

// The token of a row that cannot be sampled: argmax over its finite warm logits, 0 if there are
// none. By one CTA alone.
template <typename T, int S>
SVDK_DEVICE int fallback_token(RowShared& s, const Operands<T, S>& row, int vocab) {
  constexpr int N = Operands<T, kNone>::N;
  BestKey best = 0;
  for_vectors(warm_only(row), 0, vocab, [&](int at, int n, const auto& w, const auto&) {
    SVDK_UNROLL
    for (int e = 0; e < N; ++e) {
      if (e < n && is_finite(w[e])) best = Better()(best, best_key(w[e], at + e));
    }
  });
  best = block_reduce(s.slots, best, Better());
  return best ? best_id(best) : 0;
}

}  // namespace svdk::cuda
