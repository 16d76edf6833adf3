// The sweeps of steering.h, over the blocks of a row. Included inside an architecture's namespace.

struct Space {
  alignas(64) float w[kBlock], other[kBlock], z[kBlock], extra[kBlock];
};

// One block of a row with both operands in L1.
struct Pair {
  int begin, n, width;  // first token, tokens, tokens with padding
  Block w, other;       // other.data is null for a plain row
  bool fast;            // nothing odd: the vector loops may run unmasked
  Oddities odd;
};

// Asks for the next block of floats while this one is computed on: the arithmetic leaves the memory
// idle, and the hardware prefetcher stops at page ends. (16-bit operands gain nothing:
// bench/NOTES.md.)
inline void prefetch(const void* source, int begin, int end) {
  const float* p = static_cast<const float*>(source) + begin;
  const int n = std::min(kBlock, end - begin);
  for (int i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}

inline void prefetch_next(const Row& row, int begin, int end) {
  const int next = begin + kBlock;
  if (next >= end || row.dtype != DType::kFloat) return;
  prefetch(row.warm, next, end);
  if (row.base) prefetch(row.base, next, end);
}

inline Pair read_pair(const Row& row, int begin, int end, Space& space) {
  Pair pair;
  pair.begin = begin;
  pair.n = std::min(kBlock, end - begin);
  pair.width = padded(pair.n);
  pair.w = scan(fetch(row.warm, row.dtype, begin, pair.n, space.w), pair.width, pair.n);
  pair.other = Block{nullptr, 0, 0, true};
  if (row.base || row.vector) {
    const float* x = row.base ? fetch(row.base, row.dtype, begin, pair.n, space.other)
                              : fetch(row.vector, DType::kFloat, begin, pair.n, space.other);
    pair.other = scan(x, pair.width, pair.n);
  }
  prefetch_next(row, begin, end);
  pair.fast = pair.w.finite && pair.other.finite;
  if (!pair.fast) pair.odd = classify(pair.w.data, pair.other.data, pair.n, row.vector != nullptr);
  return pair;
}

// The same sums where products overflow float.
inline void add_exactly(const Pair& pair, Sums& s) {
  for (int i = 0; i < pair.n; ++i) {
    const double w = pair.w.data[i], b = pair.other.data[i];
    const double e = w == -kInf ? 0.0 : std::exp(w - s.max_w);
    s.z_w += e;
    if (b == -kInf) continue;
    s.z_b += std::exp(b - s.max_b);
    s.usable += e;
    if (e != 0) s.cross += e * ((w - s.max_w) - (b - s.max_b));
  }
}

inline void add(const PairSums& p, Sums& s) {
  s.z_w += p.z_w;
  s.z_b += p.z_b;
  s.usable += p.usable;
  s.cross += p.cross;
}

// Adds a block to the sums; false when the row is invalid.
inline bool accumulate(const Row& row, const Pair& pair, Sums& s) {
  s.invalid |= pair.odd.invalid;
  s.base_masked |= pair.odd.masked;
  if (s.invalid) return false;
  s.n_finite += pair.odd.any ? pair.odd.finite : pair.n;
  const double top_w = std::max<double>(s.max_w, pair.w.top);
  const double top_b = row.base ? std::max<double>(s.max_b, pair.other.top) : s.max_b;
  if (top_w > s.max_w || top_b > s.max_b) s.rescale(top_w, top_b);
  const float max_w = static_cast<float>(s.max_w), max_b = static_cast<float>(s.max_b);
  if (!row.base) {
    if (pair.w.top > -kInf) s.z_w += sum_exp(pair.w.data, pair.width, max_w);
  } else if (pair.odd.huge || std::fabs(max_w) > kHuge || std::fabs(max_b) > kHuge) {
    add_exactly(pair, s);
  } else {
    const bool masked = !pair.fast || pair.width != pair.n;
    add(masked ? pair_sums<true>(pair.w.data, pair.other.data, pair.width, max_w, max_b)
               : pair_sums<false>(pair.w.data, pair.other.data, pair.width, max_w, max_b),
        s);
  }
  return true;
}

// One look at a whole block, relative to the maxima so far. Refuses (false, nothing added) what is
// not an ordinary block: the first one, one with anything not finite, or a maximum that leaps up.
inline bool accumulate_once(const Row& row, int begin, int end, Space& space, Sums& s, Pair& pair) {
  constexpr double kLeap = 16;  // exp(16) * kBlock is far from float's limits
  if (!row.base || end - begin < kBlock || s.max_w == -kInf || s.max_b == -kInf) return false;
  const float* w = fetch(row.warm, row.dtype, begin, kBlock, space.w);
  const float* b = fetch(row.base, row.dtype, begin, kBlock, space.other);
  prefetch_next(row, begin, end);
  const PairSums p =
      pair_sums<false>(w, b, kBlock, static_cast<float>(s.max_w), static_cast<float>(s.max_b));
  const bool finite = std::isfinite(p.z_w) && std::isfinite(p.z_b) && std::isfinite(p.cross);
  if (!finite || p.top_w > s.max_w + kLeap || p.top_b > s.max_b + kLeap) return false;
  add(p, s);
  s.n_finite += kBlock;
  if (p.top_w > s.max_w || p.top_b > s.max_b) {
    s.rescale(std::max<double>(s.max_w, p.top_w), std::max<double>(s.max_b, p.top_b));
  }
  pair.begin = begin;
  pair.n = pair.width = kBlock;
  pair.w = Block{w, p.top_w, 0, true};
  pair.other = Block{b, p.top_b, 0, true};
  return true;
}

inline void collect(const Pair& pair, double threshold, CandidateBuffer& buffer) {
  const float lowest = std::numeric_limits<float>::lowest();
  const float from = std::max(lowest, std::nextafter(static_cast<float>(threshold),
                                                     -std::numeric_limits<float>::infinity()));
  if (pair.w.top < from) return;
  const Vec::F bound = Vec::set(from);
  std::vector<Candidate>& items = buffer.items;
  for (int i = 0; i < pair.width; i += Vec::N) {
    uint32_t hits = Vec::bits(Vec::ge(Vec::load(pair.w.data + i), bound));
    for (; hits; hits &= hits - 1) {
      const int k = i + __builtin_ctz(hits);
      if (items.size() == static_cast<size_t>(kCapacity)) {
        // The maximum has risen since the first ones came in; see what is still near it.
        items.erase(std::remove_if(items.begin(), items.end(),
                                   [from](const Candidate& c) { return c.warm < from; }),
                    items.end());
        if (items.size() > static_cast<size_t>(kCapacity) / 2) {
          buffer.overflow = true;
          return;
        }
      }
      items.push_back(
          {pair.begin + k, pair.w.data[k], pair.other.data ? pair.other.data[k] : 0.0f});
    }
  }
}

void sweep_sums(const Row& row, int begin, int end, double log_alpha, Sums& s,
                CandidateBuffer* buffer) {
  Space space;
  if (buffer && log_alpha == -kInf && row.vocab > kCapacity) buffer->overflow = true;
  for (int at = begin; at < end; at += kBlock) {
    Pair pair;
    if (!accumulate_once(row, at, end, space, s, pair)) {
      pair = read_pair(row, at, end, space);
      if (!accumulate(row, pair, s)) return;
    }
    if (buffer && !buffer->overflow) collect(pair, s.max_w + log_alpha, *buffer);
  }
}

// delta of a block whose operands are all finite, in float.
inline const float* deltas(const Pair& pair, int direction, const FloatConstants& f, Space& space) {
  const float *w = pair.w.data, *other = pair.other.data;
  if (direction == kVector) return other;
  if (direction == kLogRatio) delta_block<kLogRatio>(w, other, pair.width, f, space.extra);
  if (direction == kKlGradient) delta_block<kKlGradient>(w, other, pair.width, f, space.extra);
  return space.extra;
}

// Steered logits of a block as float, how far they may be off, and their maximum.
struct Steered {
  const float* z;
  float top, slack;
};

inline float clamped(double x) {
  const double most = std::numeric_limits<float>::max();
  return x == -kInf ? -std::numeric_limits<float>::infinity()
                    : static_cast<float>(std::min(std::max(x, -most), most));
}

inline Steered steer(const Pair& pair, const Constants& c, Space& space) {
  const FloatConstants f(c);
  if (c.direction == kPlain) {
    return {pair.w.data, pair.w.top, 0.0f};  // these floats are exact
  }
  const double size = 1.0 + pair.w.magnitude + pair.other.magnitude + std::fabs(c.max_w) +
                      std::fabs(c.max_b) + c.log_zw + c.log_zb + std::fabs(c.kl);
  const double reach = (1 + std::fabs(c.mu)) * size + std::fabs(f.outside_shift);
  Steered out{space.z, -std::numeric_limits<float>::infinity(), static_cast<float>(1e-6 * reach)};
  if (!pair.fast || reach > 1e30) {
    float largest = 0;
    for (int i = 0; i < pair.width; ++i) {
      space.z[i] = i < pair.n ? clamped(c.steered_logit(pair.w.data[i], pair.other.data[i]))
                              : clamped(-kInf);
      out.top = std::max(out.top, space.z[i]);
      if (space.z[i] > -kInf) largest = std::max(largest, std::fabs(space.z[i]));
    }
    // Beyond float's range nothing is known of z but its sign.
    out.slack = largest < std::numeric_limits<float>::max()
                    ? 1e-6f * (1 + largest)
                    : std::numeric_limits<float>::infinity();
    return out;
  }
  const float* delta = deltas(pair, c.direction, f, space);
  const Vec::F mu = Vec::set(f.mu), from = Vec::set(f.inside_from),
               shift = Vec::set(f.outside_shift);
  const Vec::F gone = Vec::set(-std::numeric_limits<float>::infinity());
  Vec::F top = gone;
  for (int i = 0; i < pair.width; i += Vec::N) {
    const Vec::F w = Vec::load(pair.w.data + i);
    const Vec::F in = Vec::fma(mu, Vec::load(delta + i), w);
    const Vec::F z = Vec::select(Vec::ge(w, from), in, f.drop_outside ? gone : w + shift);
    Vec::store(space.z + i, z);
    top = Vec::max(top, z);
  }
  out.top = Vec::top(top);
  if (pair.width != pair.n) {  // the padding may hold anything by now
    for (int i = pair.n; i < pair.width; ++i) space.z[i] = -std::numeric_limits<float>::infinity();
    out.top = *std::max_element(space.z, space.z + pair.n);
  }
  return out;
}

inline void apply_filter(const Pair& pair, const RowFilter& filter, Steered& s, Space& space) {
  if (filter.floor == -std::numeric_limits<float>::infinity()) return;
  s.top = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < pair.width; ++i) {
    const float z = s.z[i];
    space.z[i] = filter.keeps(z, pair.begin + i) ? z : -std::numeric_limits<float>::infinity();
    s.top = std::max(s.top, space.z[i]);
  }
  s.z = space.z;
}

struct Sampler {
  const Constants& context;
  const Noise& noise;
  Best& best;
  const Pair* pair;
  const Steered* steered;

  double exact(int i) const {
    return context.steered_logit(pair->w.data[i], pair->other.data ? pair->other.data[i] : 0.0f);
  }
  // An upper bound of the exact score, without its noise.
  double bound(float z) const {
    return (static_cast<double>(z) + steered->slack) * noise.inverse_temperature;
  }
  void offer(int i, uint32_t bits) {
    const double uniform = (bits + 0.5) * 0x1p-32;
    best.offer(exact(i) * noise.inverse_temperature - std::log(-std::log(uniform)),
               pair->begin + i);
  }
  // A token wins only if 1 - u < exp(bound - best): the cheap test in front of two logarithms.
  void consider(int i, uint32_t bits) {
    const float z = steered->z[i];
    if (z == -std::numeric_limits<float>::infinity()) return;
    const double gap = bound(z) - best.score;
    if (gap < 0 && (~bits) * 0x1p-32 > std::exp(gap)) return;
    offer(i, bits);
  }
};

void take_greedy(Sampler& s) {
  // Whoever is exactly the largest lies within twice the slack of the largest float.
  const double from = std::max<double>(s.steered->top, s.best.score) - 2.0 * s.steered->slack;
  if (s.steered->top < from || s.steered->top == -std::numeric_limits<float>::infinity()) return;
  const float lowest = std::numeric_limits<float>::lowest();
  const Vec::F bound = Vec::set(std::max(lowest, std::nextafter(static_cast<float>(from), lowest)));
  for (int i = 0; i < s.pair->width; i += Vec::N) {
    uint32_t hits = Vec::bits(Vec::ge(Vec::load(s.steered->z + i), bound));
    for (; hits; hits &= hits - 1) {
      const int k = i + __builtin_ctz(hits);
      s.best.offer(s.exact(k), s.pair->begin + k);
    }
  }
}

constexpr int kWays = Vec::N == 16 ? 4 : 2;         // Philox chains in flight
constexpr int kGroup = kWays * Vec::N * 4;          // tokens they serve
constexpr double kLargestGumbel = 22.873856958477;  // -log(-log(1 - 2^-33))
static_assert(kPad % kGroup == 0, "a padded block is a whole number of groups");

void take_noisy(Sampler& s) {
  using V = Vec;
  const float* z = s.steered->z;
  if (s.steered->top == -std::numeric_limits<float>::infinity()) return;
  if (s.best.id < 0) {
    const int i = static_cast<int>(std::max_element(z, z + s.pair->n) - z);
    s.offer(i, token_bits(s.noise.seed, s.noise.offset, s.pair->begin + i));
  }
  if (s.bound(s.steered->top) + kLargestGumbel < s.best.score) return;
  for (int g = 0; g < s.pair->width; g += kGroup) {
    V::F top = V::load(z + g);
    for (int i = V::N; i < kGroup; i += V::N) top = V::max(top, V::load(z + g + i));
    const double gap = s.bound(V::top(top)) - s.best.score;
    if (!(gap + kLargestGumbel >= 0)) continue;
    const double share = gap < 0 ? std::exp(gap) * 0x1p32 : 0x1p32;
    const uint32_t from = share >= 0x1p32 ? 0u : ~static_cast<uint32_t>(share);

    const uint32_t first = static_cast<uint32_t>(s.pair->begin + g) >> 2;
    V::U c0[kWays], c1[kWays], c2[kWays], c3[kWays];
    for (int k = 0; k < kWays; ++k) {
      c0[k] = V::iota(first + k * V::N);
      c1[k] = V::set_u(static_cast<uint32_t>(s.noise.offset));
      c2[k] = V::set_u(static_cast<uint32_t>(s.noise.offset >> 32));
      c3[k] = V::set_u(kSampleStream);
    }
    uint32_t k0 = static_cast<uint32_t>(s.noise.seed);
    uint32_t k1 = static_cast<uint32_t>(s.noise.seed >> 32);
    const V::U m0 = V::set_u(kPhiloxM0), m1 = V::set_u(kPhiloxM1);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const V::U key0 = V::set_u(k0), key1 = V::set_u(k1);
      for (int k = 0; k < kWays; ++k) {
        V::U h0, l0, h1, l1;
        V::multiply(c0[k], m0, h0, l0);
        V::multiply(c2[k], m1, h1, l1);
        c0[k] = V::xor3(h1, c1[k], key0);
        c2[k] = V::xor3(h0, c3[k], key1);
        c1[k] = l1;
        c3[k] = l0;
      }
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const V::U bound = V::set_u(from);
    for (int k = 0; k < kWays; ++k) {
      const V::U words[4] = {c0[k], c1[k], c2[k], c3[k]};
      for (int j = 0; j < 4; ++j) {
        uint32_t hits = V::ge_u(words[j], bound);
        if (!hits) continue;
        alignas(64) uint32_t raw[V::N];
        V::store_u(raw, words[j]);
        for (; hits; hits &= hits - 1) {
          const int lane = __builtin_ctz(hits);
          s.consider(g + 4 * (k * V::N + lane) + j, raw[lane]);
        }
      }
    }
  }
}

void sweep_sample(const Row& row, int begin, int end, const Constants& context,
                  const RowFilter& filter, const Noise& noise, Sums* sums, Best& best) {
  Space space;
  for (int at = begin; at < end; at += kBlock) {
    const Pair pair = read_pair(row, at, end, space);
    if (sums) {
      if (noise.needs_sums) {
        if (!accumulate(row, pair, *sums)) return;
      } else {
        sums->max_w = std::max<double>(sums->max_w, pair.w.top);
        sums->invalid |= pair.odd.invalid;
        sums->base_masked |= pair.odd.masked;
      }
      sums->beyond_float |= pair.odd.huge;
      // Without the maxima and K this is the log-ratio only up to a constant, and only if all is
      // finite and of a size that a difference survives.
      const bool doubtful = sums->base_masked || sums->beyond_float;
      if (sums->invalid || (doubtful && context.direction == kLogRatio)) return;
    }
    Steered steered = steer(pair, context, space);
    apply_filter(pair, filter, steered, space);
    Sampler sampler{context, noise, best, &pair, &steered};
    noise.greedy ? take_greedy(sampler) : take_noisy(sampler);
  }
}

void sweep_moments(const Row& row, int begin, int end, const Constants& c, MomentSums& m) {
  if (c.direction == kPlain) return;  // delta is 0, and there is no second operand to read
  Space space;
  const FloatConstants f(c);
  for (int at = begin; at < end; at += kBlock) {
    const Pair pair = read_pair(row, at, end, space);
    if (!pair.fast || pair.width != pair.n || f.huge) {
      for (int i = 0; i < pair.n; ++i) {
        const float w = pair.w.data[i];
        if (!c.in_confidence_set(w)) continue;
        m.add(std::exp(c.log_p_of(w)), c.delta_of(w, pair.other.data[i]), c.pivot);
      }
      continue;
    }
    const float* delta = deltas(pair, c.direction, f, space);
    const Vec::F from = Vec::set(f.inside_from), max_w = Vec::set(f.max_w);
    const Vec::F log_zw = Vec::set(f.log_zw), zero = Vec::set(0.0f);
    const Vec::F pivot = Vec::set(static_cast<float>(c.pivot));
    Vec::F mass = zero, first = zero, second = zero, norm2 = zero;
    for (int i = 0; i < pair.width; i += Vec::N) {
      const Vec::F w = Vec::load(pair.w.data + i);
      const Vec::Mask in = Vec::ge(w, from);
      const Vec::F d = Vec::load(delta + i), about = d - pivot;
      const Vec::F p = Vec::select(in, exp<false>((w - max_w) - log_zw), zero);
      const Vec::F kept = Vec::select(in, d, zero);
      mass = mass + p;
      first = Vec::fma(p, about, first);
      second = Vec::fma(p * about, about, second);
      norm2 = Vec::fma(kept, kept, norm2);
    }
    m.mass += Vec::sum(mass);
    m.first += Vec::sum(first);
    m.second += Vec::sum(second);
    m.norm2 += Vec::sum(norm2);
  }
}
