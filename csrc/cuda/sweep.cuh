// The first sweep: both softmax denominators, sum p (w - b), and the candidates for C, reading each
// logit once.
#pragma once
#include "team.cuh"

namespace svdk::cuda {

// Sums of the tokens seen so far, relative to the running maxima.
struct Online {
  float max_w, max_b, z_w, z_b, usable, cross;

  SVDK_DEVICE void reset() {
    max_w = max_b = -SVDK_INF;
    z_w = z_b = usable = cross = 0.0f;
  }
  SVDK_DEVICE void rescale(float new_w, float new_b) {
    const float keep = max_w == -SVDK_INF ? 0.0f : fast_exp(max_w - new_w);
    if (usable != 0.0f) {
      const float moved = cross + usable * ((max_w - new_w) - (max_b - new_b));
      cross = keep > 0.0f ? keep * moved : 0.0f;
    }
    z_w *= keep;
    usable *= keep;
    if (max_b != new_b) z_b *= max_b == -SVDK_INF ? 0.0f : fast_exp(max_b - new_b);
    max_w = new_w;
    max_b = new_b;
  }
};

struct Oddities {
  int dead = 0, flags = 0;

  template <int S>
  SVDK_DEVICE void look_at(float w, float other) {
    const bool warm = w > -SVDK_INF;
    if (!(w < SVDK_INF)) flags |= kInvalid;
    if (S == kBase && !(other < SVDK_INF)) flags |= kInvalid;
    if (S == kVectorRow && !is_finite(other)) flags |= kInvalid;
    if (S == kBase && warm && other == -SVDK_INF) flags |= kBaseMasked;
    if (S == kBase && warm && fabsf(w - other) >= kApart) flags |= kFar;
    if (w == -SVDK_INF) ++dead;
  }
  SVDK_DEVICE void leave(Shared& s) const {
    if (dead) atomicAdd(&s.part.dead, dead);
    if (flags) atomicOr(&s.part.flags, flags);
  }
};

// Not finite if an operand is not (or if warm and base logits are kApart: then the product is out
// of range): look closer.
template <int S>
SVDK_DEVICE float suspicion(float w, float other, float so_far) {
  if (S == kBase) return fmaf(w - other, 0x1p128f / kApart, so_far);
  return fmaf(S == kVectorRow ? w + other : w, 0.0f, so_far);
}

template <int S, int N>
SVDK_DEVICE void add(Online& o, Oddities& odd, const float (&w)[N], const float (&b)[N], int n) {
  float top_w = w[0], top_b = S == kBase ? b[0] : -SVDK_INF;
  SVDK_UNROLL
  for (int e = 1; e < N; ++e) {
    top_w = fmaxf(top_w, w[e]);
    if (S == kBase) top_b = fmaxf(top_b, b[e]);
  }
  if (top_w > o.max_w || top_b > o.max_b) o.rescale(fmaxf(o.max_w, top_w), fmaxf(o.max_b, top_b));
  // The cross term (or the suspicion) is finite exactly when nothing in the vector is odd.
  float z = 0.0f, y = 0.0f, c = 0.0f;
  SVDK_UNROLL
  for (int e = 0; e < N; ++e) {
    const float dw = w[e] - o.max_w, ew = fast_exp(dw);
    z += ew;
    if (S == kBase) {
      const float db = b[e] - o.max_b;
      y += fast_exp(db);
      c = fmaf(ew, dw - db, c);
    } else {
      c = suspicion<S>(w[e], b[e], c);
    }
  }
  if (n == N && is_finite(c)) {
    o.z_w += z;
    if (S == kBase) {
      o.usable += z;
      o.z_b += y;
      o.cross += c;
    }
    return;
  }
  SVDK_UNROLL
  for (int e = 0; e < N; ++e) {
    if (e >= n) continue;
    odd.look_at<S>(w[e], b[e]);
    const float ew = w[e] > -SVDK_INF ? fast_exp(w[e] - o.max_w) : 0.0f;
    o.z_w += ew;
    if (S == kBase && b[e] > -SVDK_INF) {
      o.z_b += fast_exp(b[e] - o.max_b);
      o.usable += ew;
      if (ew > 0.0f) o.cross += ew * ((w[e] - o.max_w) - (b[e] - o.max_b));
    }
  }
}

// Leaves the warp's sums of a slice where merge_sums finds them.
SVDK_DEVICE void close_slice(Shared& s, Online& o, int slice) {
  const float max_w = warp_max_of(o.max_w), max_b = warp_max_of(o.max_b);
  if (max_w != o.max_w || max_b != o.max_b) o.rescale(max_w, max_b);
  const float z_w = warp_sum(o.z_w), z_b = warp_sum(o.z_b);
  const float usable = warp_sum(o.usable), cross = warp_sum(o.cross);
  if (lane_id() == 0) {
    s.part.sums[slice][warp_id()] = {{max_w, max_b, z_w, z_b, usable, cross}};
  }
}

SVDK_DEVICE void push(Shared& s, int id, float warm, float other) {
  const uint32_t place = atomicAdd(&s.part.count, 1u);
  if (place < static_cast<uint32_t>(kList)) s.part.list[place] = {id, warm, other};
}

// What a token must reach to be in C, were `top` the maximum; low enough to be safe of rounding.
SVDK_DEVICE float candidate_from(float top, float log_alpha) {
  const float from = top + log_alpha - 4e-7f * (fabsf(top) + fabsf(log_alpha));
  return fmaxf(from, -FLT_MAX);
}

// Adds this CTA's slices up; with `collect`, candidates within log_alpha of the running maximum go
// to part.list. Lists hold no order. Ends without a barrier.
template <typename T, int S>
SVDK_DEVICE void first_sweep(Cta& cta, const Pair<T, S>& row, float log_alpha, bool collect) {
  constexpr int N = Pair<T, S>::N, U = Pair<T, S>::kUnroll;
  using Other = typename Pair<T, S>::Other;
  Shared& s = cta.s;
  Online o;
  Oddities odd;
  float seen = -SVDK_INF;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    o.reset();
    const int end = cta.end(slice);
    SVDK_ROLLED
    for (int from = cta.begin(slice); from < end; from += U * kThreads * N) {
      Lanes<T, N> w[U];
      Lanes<Other, N> other[U];
      SVDK_UNROLL
      for (int u = 0; u < U; ++u) {
        const int at = from + (u * kThreads + static_cast<int>(threadIdx.x)) * N;
        if (at >= end) continue;
        w[u].fetch(row.warm, at);
        if (S != kNone) other[u].fetch(row.other, at);
      }
      SVDK_UNROLL
      for (int u = 0; u < U; ++u) {
        const int at = from + (u * kThreads + static_cast<int>(threadIdx.x)) * N;
        const bool here = at < end;
        float x[N], y[N];
        float top = -SVDK_INF;
        if (here) {
          w[u].unpack(x);
          if (S != kNone) other[u].unpack(y);
          SVDK_UNROLL
          for (int e = 0; e < N; ++e) top = fmaxf(top, x[e]);
        }
        if (collect) {
          // One maximum over the warp at the very start: alone, a thread's own lets too many in.
          const bool first = u == 0 && from == cta.begin(cta.first_slice());
          const float high = first ? warp_max_of(top) : top;
          if (high > seen) {
            seen = high;
            atomicMax(&s.running, ordered_key(high));
          }
          seen = fmaxf(seen, key_value(read_shared(&s.running)));
          const float bound = candidate_from(seen, log_alpha);
          if (here && top >= bound && read_shared(&s.part.count) <= kList) {
            SVDK_UNROLL
            for (int e = 0; e < N; ++e) {
              if (x[e] >= bound) push(s, at + e, x[e], S == kNone ? 0.0f : y[e]);
            }
          }
        }
        if (here) add<S>(o, odd, x, y, end - at < N ? end - at : N);
      }
    }
    close_slice(s, o, slice);
  }
  odd.leave(s);
}

// Adds up what the sweeps of all parts left, into s.sums. Called by the whole block.
SVDK_DEVICE void merge_sums(Cta& cta, const Parts& parts) {
  Shared& s = cta.s;
  if (warp_id() == 0) {
    const int entries = cta.slices.count * kWarps;
    float max_w = -SVDK_INF, max_b = -SVDK_INF;
    SVDK_ROLLED
    for (int e = lane_id(); e < entries; e += 32) {
      const WarpSums& x = cta.entry(parts, e);
      max_w = fmaxf(max_w, x.v[0]);
      max_b = fmaxf(max_b, x.v[1]);
    }
    max_w = warp_max_of(max_w);
    max_b = warp_max_of(max_b);
    double z_w = 0, z_b = 0, usable = 0, cross = 0;
    SVDK_ROLLED
    for (int e = lane_id(); e < entries; e += 32) {
      const WarpSums& x = cta.entry(parts, e);
      Online o{x.v[0], x.v[1], x.v[2], x.v[3], x.v[4], x.v[5]};
      o.rescale(max_w, max_b);
      z_w += o.z_w;
      z_b += o.z_b;
      usable += o.usable;
      cross += o.cross;
    }
    z_w = warp_sum(z_w);
    z_b = warp_sum(z_b);
    usable = warp_sum(usable);
    cross = warp_sum(cross);
    int dead = 0, flags = 0;
    SVDK_ROLLED
    for (int r = lane_id(); r < parts.count; r += 32) {
      dead += parts.at(r).dead;
      flags |= parts.at(r).flags;
    }
    dead = warp_sum(dead);
    for (int o = 16; o; o >>= 1) flags |= __shfl_xor_sync(0xffffffffu, flags, o);
    if (lane_id() == 0) s.sums = {max_w, max_b, z_w, z_b, usable, cross, dead, flags};
  }
  __syncthreads();
}

// sum p (log p - log q) over the tokens with a finite base logit.
SVDK_DEVICE double divergence(const Context& c, double z_w, double usable, double cross) {
  return usable > 0 ? (cross + usable * (c.log_b - c.log_w)) / z_w : 0.0;
}

// The formulas of a row from s.sums; mu and the size of C are set later.
template <int S>
SVDK_DEVICE Context make_context(const Shared& s, const RowArgs& a, double log_alpha) {
  const Sums& sums = s.sums;
  Context c;
  c.direction = a.direction;
  c.finite = a.vocab - sums.dead;
  c.inside = c.finite;
  c.max_w = sums.max_w;
  c.max_b = 0;
  c.inside_from = -FLT_MAX;
  c.log_alpha = log_alpha;
  c.mu = 0;
  c.penalty = a.penalty;
  c.log_w = logf(static_cast<float>(sums.z_w));
  c.log_b = c.kl = 0;
  if (S == kBase && sums.max_b != -SVDK_INF) {
    c.max_b = sums.max_b;
    c.log_b = logf(static_cast<float>(sums.z_b));
    c.kl = divergence(c, sums.z_w, sums.usable, sums.cross);
  }
  return c;
}

// K once more, in double, for a row whose logits take its terms out of the range of a float. By all
// CTAs of the row; nobody waits for such rows, so tokens are read one by one.
template <typename T>
SVDK_DEVICE void sum_in_double(Cta& cta, const Pair<T, kBase>& row) {
  Context& c = cta.s.verdict.context;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    double cross = 0;
    SVDK_ROLLED
    for (int i = cta.begin(slice) + static_cast<int>(threadIdx.x); i < cta.end(slice);
         i += kThreads) {
      const float w = read_one(row.warm, i), b = read_one(row.other, i);
      const float p = fast_exp(w - c.max_w);
      if (p == 0.0f || b == -SVDK_INF) continue;
      cross += p * ((static_cast<double>(w) - c.max_w) - (static_cast<double>(b) - c.max_b));
    }
    leave_sums(cta.s, slice, cross, 0, 0, 0);
  }
  double total[4];
  merge_plain(cta, total);
  const Sums& sums = cta.s.sums;
  if (cta.leads() && threadIdx.x == 0) c.kl = divergence(c, sums.z_w, sums.usable, total[0]);
  cta.hand_out();
}

// The candidates of all parts that are in C (all of them with `everything`) into this CTA's list,
// in order of id. Returns how many, or -1 when some were lost or there are more than kList.
SVDK_DEVICE int compact(Cta& cta, const Parts& parts, const Context& c, bool everything) {
  Shared& s = cta.s;
  if (threadIdx.x == 0) s.listed = 0;
  __syncthreads();
  bool lost = false;
  SVDK_ROLLED
  for (int r = 0; r < parts.count; ++r) {
    const Part& part = parts.at(r);
    const int count = static_cast<int>(part.count);
    if (count > kList) {
      lost = true;
      continue;
    }
    SVDK_ROLLED
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Candidate item = part.list[i];
      if (!everything && !is_inside(c, item.warm)) continue;
      const uint32_t place = atomicAdd(&s.listed, 1u);
      if (place < static_cast<uint32_t>(kList)) s.scratch.list.items[place] = item;
    }
  }
  __syncthreads();
  const int n = static_cast<int>(s.listed);
  if (lost || n > kList) return -1;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const Candidate item = s.scratch.list.items[i];
    int place = 0;
    SVDK_ROLLED
    for (int j = 0; j < n; ++j) place += s.scratch.list.items[j].id < item.id;
    s.part.list[place] = item;
  }
  __syncthreads();
  return n;
}

// A sweep for the tokens of C alone, now that its threshold is known. part.count is their number,
// even beyond kList. Returns the number in the whole row.
template <typename T, int S>
SVDK_DEVICE int collect_sweep(Cta& cta, const Pair<T, S>& row, float from) {
  Shared& s = cta.s;
  if (threadIdx.x == 0) s.part.count = 0;
  __syncthreads();
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors(
        row, cta.begin(slice), cta.end(slice),
        [&](int at, int n, const float (&w)[Pair<T, S>::N], const float (&y)[Pair<T, S>::N]) {
          uint32_t hits = 0;
          SVDK_UNROLL
          for (int e = 0; e < Pair<T, S>::N; ++e) hits += e < n && w[e] >= from;
          if (hits == 0) return;
          uint32_t place = atomicAdd(&s.part.count, hits);
          SVDK_UNROLL
          for (int e = 0; e < Pair<T, S>::N; ++e) {
            if (!(e < n && w[e] >= from)) continue;
            if (place < static_cast<uint32_t>(kList)) {
              s.part.list[place] = {at + e, w[e], S == kNone ? 0.0f : y[e]};
            }
            ++place;
          }
        });
  }
  const Parts parts = cta.own_parts();
  cta.team_barrier();
  int total = 0;
  SVDK_ROLLED
  for (int r = 0; r < parts.count; ++r) total += static_cast<int>(parts.at(r).count);
  return total;
}

}  // namespace svdk::cuda
