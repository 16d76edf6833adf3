// Step 11 over a whole row: the best perturbed (or greedy) steered logit, noise drawn for every
// token. Included inside an architecture's namespace.

inline void filter_block(const BlockOperands& block, const RowFilter& filter, SteeredBlock& s,
                         Scratch& scratch) {
  if (filter.floor == -kFloatInf) return;
  s.top = -kFloatInf;
  for (int i = 0; i < block.width; ++i) {
    const float z = s.z[i];
    scratch.z[i] = filter.keeps(z, block.begin + i) ? z : -kFloatInf;
    s.top = std::max(s.top, scratch.z[i]);
  }
  s.z = scratch.z;
}

struct BlockDraw {
  const Constants& constants;
  const Noise& noise;
  Best& best;
  const BlockOperands* block;
  const SteeredBlock* steered;

  double exact(int i) const {
    return constants.steered_logit(block->w.data[i], block->other_at(i));
  }
  // An upper bound of the exact score, without its noise.
  double bound(float z) const {
    return (static_cast<double>(z) + steered->slack) * noise.inverse_temperature;
  }
  void offer(int i, uint32_t bits) {
    best.offer(exact(i) * noise.inverse_temperature + gumbel_of(bits), block->begin + i);
  }
  // A token wins only if 1 - u < exp(bound - best): the cheap test in front of two logarithms.
  void consider(int i, uint32_t bits) {
    const float z = steered->z[i];
    if (z == -kFloatInf) return;
    const double gap = bound(z) - best.score;
    if (gap < 0 && (~bits) * 0x1p-32 > std::exp(gap)) return;
    offer(i, bits);
  }
};

void draw_greedy(BlockDraw& s) {
  // Whoever is exactly the largest lies within twice the slack of the largest float.
  const double from = std::max<double>(s.steered->top, s.best.score) - 2.0 * s.steered->slack;
  if (s.steered->top < from || s.steered->top == -kFloatInf) return;
  const Vec::F bound =
      Vec::set(std::max(-FLT_MAX, std::nextafter(static_cast<float>(from), -FLT_MAX)));
  for (int i = 0; i < s.block->width; i += Vec::N) {
    uint32_t hits = Vec::bits(Vec::ge(Vec::load(s.steered->z + i), bound));
    for (; hits; hits &= hits - 1) {
      const int k = i + __builtin_ctz(hits);
      s.best.offer(s.exact(k), s.block->begin + k);
    }
  }
}

constexpr int kWays = Vec::N == 16 ? 4 : 2;  // Philox chains in flight
constexpr int kGroup = kWays * Vec::N * 4;   // tokens they serve
static_assert(kPad % kGroup == 0, "a padded block is a whole number of groups");

void draw_noisy(BlockDraw& s) {
  using V = Vec;
  const float* z = s.steered->z;
  if (s.steered->top == -kFloatInf) return;
  if (s.best.id < 0) {
    const int i = static_cast<int>(std::max_element(z, z + s.block->n) - z);
    s.offer(i, token_bits(s.noise.seed, s.noise.offset, s.block->begin + i));
  }
  if (s.bound(s.steered->top) + kLargestGumbel < s.best.score) return;
  for (int g = 0; g < s.block->width; g += kGroup) {
    V::F top = V::load(z + g);
    for (int i = V::N; i < kGroup; i += V::N) top = V::max(top, V::load(z + g + i));
    const double gap = s.bound(V::top(top)) - s.best.score;
    if (!(gap + kLargestGumbel >= 0)) continue;
    const double share = gap < 0 ? std::exp(gap) * 0x1p32 : 0x1p32;
    const uint32_t from = share >= 0x1p32 ? 0u : ~static_cast<uint32_t>(share);

    const uint32_t first = static_cast<uint32_t>(s.block->begin + g) >> 2;
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

// Steps 1 and 2 on the way of a draw; false when the draw is to break off.
inline bool look_at(const RowLogits& row, const BlockOperands& block, const SumsOnTheWay& found) {
  const Exceptional& exceptional = block.exceptional;
  Sums& sums = found.sums;
  if (found.all) {
    if (!accumulate(row, block, sums)) return false;
  } else {
    sums.max_w = std::max<double>(sums.max_w, block.w.top);
    sums.invalid |= exceptional.invalid;
    sums.base_masked |= exceptional.base_masked;
  }
  sums.beyond_float |= exceptional.beyond_float;
  // Without the maxima and K this is the log-ratio only up to a constant, and only if all is
  // finite and of a size that a difference survives.
  return !sums.invalid && !(sums.needs_maxima() && row.direction == kLogRatio);
}

void draw_row(const Slice& slice, const Constants& constants, const RowFilter& filter,
              const Noise& noise, const SumsOnTheWay* found, Best& best) {
  Scratch scratch;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    if (found && !look_at(slice.row, block, *found)) return;
    SteeredBlock steered = steered_logits(block, constants, scratch);
    filter_block(block, filter, steered, scratch);
    BlockDraw draw{constants, noise, best, &block, &steered};
    noise.greedy ? draw_greedy(draw) : draw_noisy(draw);
  }
}
