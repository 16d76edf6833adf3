// The finish of a row whose tokens in play fit the list: strength, steering, filters, noise and
// diagnostics, in double but for exponentials and logarithms. Everything here is done by one CTA on
// part.list, which is in order of id.
#pragma once
#include "sweep.cuh"

namespace svdk::cuda {

// Of delta (0 outside C) under p.
struct Moments {
  double mean, variance, norm2;
};

// Sums over C of p, p d, p d^2 with d = delta - pivot, and of delta^2. About 0, the variance of a
// vector with a common offset, or in a confident row, would be lost in rounding; so the pivot is a
// vector's entry at the likeliest token.
struct MomentSums {
  double mass, first, second, norm2;

  SVDK_DEVICE void add(double p, double delta, double pivot) {
    const double d = delta - pivot;
    mass += p;
    first += p * d;
    second += p * d * d;
    norm2 += delta * delta;
  }
  // `outside`: the mass of the tokens outside C, which do not move.
  SVDK_DEVICE Moments about(double pivot, double outside, double total) const {
    const double m = (first - outside * pivot) / total;
    return {pivot + m, fmax((second + outside * pivot * pivot) / total - m * m, 0.0), norm2};
  }
};

// Log of the mass outside C relative to that of the likeliest token; -inf for none. Summed about
// its own maximum: a strength can bring back what would underflow next to the tokens of C. By all
// CTAs of the row.
template <typename T, int S>
SVDK_DEVICE double log_outside(Cta& cta, const Pair<T, S>& row, const Context& c) {
  constexpr int N = Pair<T, kNone>::N;
  const float from = inside_from(c.max_w, c.log_alpha);
  const Pair<T, kNone> warm{row.warm, {}};
  Shared& s = cta.s;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    float top = -SVDK_INF;
    double sum = 0;
    for_vectors(warm, cta.begin(slice), cta.end(slice),
                [&](int, int n, const float (&w)[N], const float (&)[N]) {
                  float high = top;
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (e < n && w[e] < from) high = fmaxf(high, w[e]);
                  }
                  if (high == -SVDK_INF) return;
                  sum *= top == -SVDK_INF ? 0.0f : fast_exp(top - high);
                  top = high;
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (e < n && w[e] < from) sum += fast_exp(w[e] - top);
                  }
                });
    const float high = warp_max_of(top);
    leave_sums(s, slice, top == -SVDK_INF ? 0.0 : sum * fast_exp(top - high), 0, 0, 0);
    if (lane_id() == 0) s.part.sums[slice][warp_id()].d[1] = high;
  }
  const Parts parts = cta.own_parts();
  cta.team_barrier();
  const int entries = cta.slices.count * kWarps;
  double top = -static_cast<double>(SVDK_INF), sum = 0;
  SVDK_ROLLED
  for (int e = lane_id(); e < entries; e += 32) top = fmax(top, cta.entry(parts, e).d[1]);
  for (int o = 16; o; o >>= 1) top = fmax(top, __shfl_xor_sync(0xffffffffu, top, o));
  SVDK_ROLLED
  for (int e = lane_id(); e < entries; e += 32) {
    const WarpSums& x = cta.entry(parts, e);
    if (x.d[0] > 0) sum += x.d[0] * fast_exp(static_cast<float>(x.d[1] - top));
  }
  sum = warp_sum(sum);
  cta.team_barrier();
  return (top - c.max_w) + static_cast<double>(logf(static_cast<float>(sum)));
}

// A vector's entry at the likeliest token of the list, 0 for the other directions.
template <int S>
SVDK_DEVICE double list_pivot(Shared& s, int n) {
  if (S != kVectorRow) return 0.0;
  unsigned long long best = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const unsigned long long key = best_key(s.part.list[i].warm, i);
    if (key > best) best = key;
  }
  return s.part.list[best_id(block_max(s, best))].other;
}

template <int S>
SVDK_DEVICE MomentSums list_moments(Shared& s, const Context& c, int n, double pivot) {
  MomentSums m{0, 0, 0, 0};
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const Candidate k = s.part.list[i];
    m.add(fast_exp(static_cast<float>(log_p_of(c, k.warm))), delta_of(c, k.warm, k.other), pivot);
  }
  const double mass = S == kVectorRow ? block_sum(s, m.mass) : 1.0;  // nobody asks for the others'
  return {mass, block_sum(s, m.first), block_sum(s, m.second), block_sum(s, m.norm2)};
}

template <typename T, int S>
SVDK_DEVICE float other_at(const Pair<T, S>& row, int id) {
  if constexpr (S == kNone) {
    return 0.0f;
  } else {
    return read_one(row.other, id);
  }
}

// The direction at one token of a row, 0 outside C.
template <typename T, int S>
SVDK_DEVICE double delta_at(const Pair<T, S>& row, const Context& c, int id) {
  const float w = read_one(row.warm, id);
  return is_inside(c, w) ? delta_of(c, w, other_at(row, id)) : 0.0;
}

// mu for a row's strength mode.
SVDK_DEVICE double strength_of(const SampleRow& p, const Moments& m, double at_label) {
  if (p.mode == kConstant) return p.strength;
  if (p.mode == kKlBudget) {
    return m.variance < kEps ? 0.0 : sqrt(2 * p.strength / m.variance);
  }
  return m.norm2 < kEps ? 0.0 : (at_label - m.mean) / (m.norm2 + kEps);
}

struct LogSum {
  double top, log_sum;  // log sum exp z = top + log_sum
};

// Steered logits of the list into scratch.list.z, and their log-sum-exp.
SVDK_DEVICE LogSum steer_list(Shared& s, const Context& c, int n) {
  double top = -static_cast<double>(SVDK_INF);
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const double z = steered_of(c, c.mu, s.part.list[i].warm, s.part.list[i].other);
    s.scratch.list.z[i] = z;
    top = fmax(top, z);
  }
  top = block_max(s, top);
  double sum = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    sum += fast_exp(static_cast<float>(s.scratch.list.z[i] - top));
  }
  return {top, static_cast<double>(logf(static_cast<float>(block_sum(s, sum))))};
}

SVDK_DEVICE int block_count(Shared& s, int mine) {
  return static_cast<int>(block_sum(s, static_cast<double>(mine)));
}

// How many of the list's first ranks top-k, top-p and min-p keep; fills scratch.list.order (rank ->
// place). `total` is the mass sum exp((z - max) / temperature) that top-p speaks of, or negative:
// that of the list (after top-k).
SVDK_DEVICE int keep_ranks(Shared& s, const SampleRow& p, int n, double total) {
  const double* z = s.scratch.list.z;
  int* order = s.scratch.list.order;
  const double inverse = 1.0 / p.temperature;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    int rank = 0;
    SVDK_ROLLED
    for (int j = 0; j < n; ++j) rank += z[j] > z[i] || (z[j] == z[i] && j < i);
    order[rank] = i;
  }
  __syncthreads();
  int kept = n;
  if (p.top_k > 0 && p.top_k < n) {
    const double kth = z[order[p.top_k - 1]];
    int mine = 0;
    SVDK_ROLLED
    for (int i = threadIdx.x; i < n; i += kThreads) mine += z[i] >= kth;  // ties stay
    kept = block_count(s, mine);
    total = -1;
  }
  const double top = z[order[0]];
  double* weight = reinterpret_cast<double*>(s.scratch.list.items);
  double sum = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    weight[i] = fast_exp(static_cast<float>((z[order[i]] - top) * inverse));
    sum += weight[i];
  }
  sum = block_sum(s, sum);
  const double budget = p.top_p >= 1 ? DBL_MAX : p.top_p * (total < 0 ? sum : total);
  const double lowest = p.min_p > 0 ? log(p.min_p) : -DBL_MAX;
  int mine = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    double before = 0;
    if (p.top_p < 1) {
      SVDK_ROLLED
      for (int j = 0; j < i; ++j) before += weight[j];
    }
    mine += i == 0 || (before < budget && (z[order[i]] - top) * inverse >= lowest);
  }
  return block_count(s, mine);
}

// Greedy or perturbed argmax over the list, whose steered logits are in scratch.list.z.
SVDK_DEVICE int draw_list(Shared& s, const SampleRow& p, int n, double total) {
  const double* z = s.scratch.list.z;
  const bool ranked = p.filtered();
  const int kept = ranked ? keep_ranks(s, p, n, total) : n;
  const double inverse = p.temperature > 0 ? 1.0 / p.temperature : 1.0;
  double best = -DBL_MAX;
  int best_place = kMaxId;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    const int place = ranked ? s.scratch.list.order[i] : i;
    if (z[place] < -DBL_MAX) continue;
    double score = z[place] * inverse;
    if (p.temperature > 0) score += gumbel(word_of(p.seed, p.offset, s.part.list[place].id));
    if (score > best || best_place == kMaxId || (score == best && place < best_place)) {
      best = score;
      best_place = place;
    }
  }
  for (int o = 16; o; o >>= 1) {
    const double score = __shfl_xor_sync(0xffffffffu, best, o);
    const int place = __shfl_xor_sync(0xffffffffu, best_place, o);
    if (place != kMaxId &&
        (best_place == kMaxId || score > best || (score == best && place < best_place))) {
      best = score;
      best_place = place;
    }
  }
  if (lane_id() == 0) {
    s.slot[warp_id()] = best;
    s.slot64[1][warp_id()] = static_cast<unsigned long long>(best_place);
  }
  __syncthreads();
  int winner = 0;
  for (int i = 1; i < kWarps; ++i) {
    const int place = static_cast<int>(s.slot64[1][i]);
    const int leader = static_cast<int>(s.slot64[1][winner]);
    if (place == kMaxId) continue;
    if (leader == kMaxId || s.slot[i] > s.slot[winner] ||
        (s.slot[i] == s.slot[winner] && place < leader)) {
      winner = i;
    }
  }
  const int place = static_cast<int>(s.slot64[1][winner]);
  const int token = s.part.list[place].id;
  __syncthreads();
  return token;
}

}  // namespace svdk::cuda
