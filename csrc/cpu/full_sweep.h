// Steps 5 to 9 over a whole row, once its constants are known: steered logits of blocks, moments,
// and the log-partition along mu. Included inside an architecture's namespace.

inline float clamped(double x) {
  const double most = FLT_MAX;
  return x == -kInf ? -kFloatInf : static_cast<float>(std::min(std::max(x, -most), most));
}

// delta of a block whose operands are all finite, in float.
inline const float* delta_of(const BlockOperands& block, int direction, const FloatConstants& f,
                             Scratch& scratch) {
  const float *w = block.w.data, *other = block.other.data;
  if (direction == kVector) return other;
  if (direction == kLogRatio) delta_block<kLogRatio>(w, other, block.width, f, scratch.extra);
  if (direction == kKlGradient) delta_block<kKlGradient>(w, other, block.width, f, scratch.extra);
  return scratch.extra;
}

// Steered logits of a block as float, how far they may be off, and their maximum.
struct SteeredBlock {
  const float* z;
  float top, slack;
};

SVDK_INLINED SteeredBlock steered_logits(const BlockOperands& block, const Constants& c,
                                         Scratch& scratch) {
  const FloatConstants f(c);
  if (c.direction == kPlain) {
    return {block.w.data, block.w.top, 0.0f};  // these floats are exact
  }
  const double size = 1.0 + block.w.magnitude + block.other.magnitude + std::fabs(c.max_w) +
                      std::fabs(c.max_b) + c.log_zw + c.log_zb + std::fabs(c.kl);
  const double reach = (1 + std::fabs(c.mu)) * size + std::fabs(f.outside_shift);
  SteeredBlock out{scratch.z, -kFloatInf, static_cast<float>(1e-6 * reach)};
  if (!block.ordinary || reach > 1e30) {
    float largest = 0;
    for (int i = 0; i < block.width; ++i) {
      scratch.z[i] = i < block.n ? clamped(c.steered_logit(block.w.data[i], block.other.data[i]))
                                 : clamped(-kInf);
      out.top = std::max(out.top, scratch.z[i]);
      if (scratch.z[i] > -kInf) largest = std::max(largest, std::fabs(scratch.z[i]));
    }
    // Beyond float's range nothing is known of z but its sign.
    out.slack = largest < FLT_MAX ? 1e-6f * (1 + largest) : kFloatInf;
    return out;
  }
  const float* delta = delta_of(block, c.direction, f, scratch);
  const Vec::F mu = Vec::set(f.mu), from = Vec::set(f.inside_from),
               shift = Vec::set(f.outside_shift);
  const Vec::F gone = Vec::set(-kFloatInf);
  Vec::F top = gone;
  for (int i = 0; i < block.width; i += Vec::N) {
    const Vec::F w = Vec::load(block.w.data + i);
    const Vec::F in = Vec::fma(mu, Vec::load(delta + i), w);
    const Vec::F z = Vec::select(Vec::ge(w, from), in, f.drop_outside ? gone : w + shift);
    Vec::store(scratch.z + i, z);
    top = Vec::max(top, z);
  }
  out.top = Vec::top(top);
  if (block.width != block.n) {  // the padding may hold anything by now
    for (int i = block.n; i < block.width; ++i) scratch.z[i] = -kFloatInf;
    out.top = *std::max_element(scratch.z, scratch.z + block.n);
  }
  return out;
}

void steer(const Slice& slice, const Constants& c, float* z) {
  Scratch scratch;
  for (int at = slice.begin; at < slice.end; at += kBlock, z += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    std::memcpy(z, steered_logits(block, c, scratch).z, block.n * sizeof(float));
  }
}

// Step 7.
void moments(const Slice& slice, const Constants& c, MomentSums& m) {
  if (c.direction == kPlain) return;  // delta is 0, and there is no second operand to read
  Scratch scratch;
  const FloatConstants f(c);
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    if (!block.ordinary || block.width != block.n || f.beyond_float) {
      for (int i = 0; i < block.n; ++i) {
        const float w = block.w.data[i];
        if (!c.in_confidence_set(w)) continue;
        m.add(std::exp(c.log_p_of(w)), c.delta_of(w, block.other.data[i]), c.pivot);
      }
      continue;
    }
    const float* delta = delta_of(block, c.direction, f, scratch);
    const Vec::F from = Vec::set(f.inside_from), max_w = Vec::set(f.max_w);
    const Vec::F log_zw = Vec::set(f.log_zw), zero = Vec::set(0.0f);
    const Vec::F pivot = Vec::set(static_cast<float>(c.pivot));
    Vec::F mass = zero, first = zero, second = zero, norm2 = zero;
    for (int i = 0; i < block.width; i += Vec::N) {
      const Vec::F w = Vec::load(block.w.data + i);
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

// A block as z_hat = still + mu * move: what moves with mu, and what does not. Tokens that cannot
// be drawn have still = -inf and move = 0.
struct MovingBlock {
  alignas(64) float still[kBlock], move[kBlock];
  float reach, largest;  // of |move|, and of |still| where it is finite

  void split(const BlockOperands& block, const Constants& c, Scratch& scratch) {
    const float outside = c.drops_outside() ? 0.0f : static_cast<float>(c.penalty);
    const FloatConstants f(c);
    const bool simple =
        block.ordinary && block.width == block.n && c.direction != kPlain && !f.beyond_float;
    const float* delta = simple ? delta_of(block, c.direction, f, scratch) : nullptr;
    for (int i = 0; i < block.n; ++i) {
      const float w = block.w.data[i];
      const bool in = simple ? w >= f.inside_from : c.in_confidence_set(w);
      const bool gone = in ? false : c.drops_outside() || w == -kFloatInf;
      still[i] = gone ? -kFloatInf : w;
      move[i] = gone     ? 0.0f
                : !in    ? outside
                : simple ? delta[i]
                         : clamped(c.delta_of(w, block.other_at(i)));
    }
    for (int i = block.n; i < block.width; ++i) {
      still[i] = -kFloatInf;
      move[i] = 0.0f;
    }
    float most_move = 0, most_still = 0;
    for (int i = 0; i < block.n; ++i) {
      most_move = std::max(most_move, std::fabs(move[i]));
      if (still[i] != -kFloatInf) most_still = std::max(most_still, std::fabs(still[i]));
    }
    reach = most_move;
    largest = most_still;
  }
};

// Steered logits above this are summed in double: float would round 1e-3 and more away.
constexpr double kExact = 1e4;

// One block at one strength in double.
inline void partition_exactly(const BlockOperands& block, const Constants& c, Partition& part) {
  auto moves = [&](int i) {
    const float w = block.w.data[i];
    return c.in_confidence_set(w) ? c.delta_of(w, block.other_at(i)) : c.penalty;
  };
  double top = -kInf;
  int at = 0;
  for (int i = 0; i < block.n; ++i) {
    const double z = c.steered_logit(block.w.data[i], block.other_at(i));
    if (z > top) top = z, at = i;
  }
  if (top == -kInf) return;
  if (top > part.max) part.rescale(top, moves(at));
  for (int i = 0; i < block.n; ++i) {
    const double z = c.steered_logit(block.w.data[i], block.other_at(i));
    if (z == -kInf) continue;
    part.add(std::exp(z - part.max), moves(i));
    if (c.in_confidence_set(block.w.data[i])) part.greedy.offer(z, block.begin + i);
  }
}

// The greedy token, which is looked for in the confidence set alone. `top`: the largest of the
// steered logits z.
inline void offer_greedy(const BlockOperands& block, const MovingBlock& moving, const Constants& c,
                         const float* z, float top, Best& greedy) {
  const float size = block.ordinary ? block.w.magnitude + block.other.magnitude : 1.0f;
  const float from = static_cast<float>(c.max_w + c.log_alpha);
  const float slack = 1e-6f * static_cast<float>(1 + (1 + std::fabs(c.mu)) * (size + moving.reach));
  const float need = static_cast<float>(greedy.score) - 2 * slack;
  if (top < need) return;
  float inside_top = -kFloatInf;
  for (int i = 0; i < block.n; ++i) {
    if (block.w.data[i] >= from && moving.still[i] != -kFloatInf) {
      inside_top = std::max(inside_top, z[i]);
    }
  }
  const float least = std::max(need, inside_top - 2 * slack);
  for (int i = 0; i < block.n; ++i) {
    const float w = block.w.data[i];
    if (z[i] < least || !c.in_confidence_set(w)) continue;
    greedy.offer(c.steered_logit(w, block.other_at(i)), block.begin + i);
  }
}

// One block at one strength.
SVDK_INLINED void add_block(const BlockOperands& block, const MovingBlock& moving,
                            const Constants& c, float* z, Partition& part) {
  const Vec::F mu = Vec::set(static_cast<float>(c.mu));
  for (int i = 0; i < block.width; i += Vec::N) {
    Vec::store(z + i, Vec::fma(mu, Vec::load(moving.move + i), Vec::load(moving.still + i)));
  }
  Vec::F highest = Vec::load(z);
  for (int i = Vec::N; i < block.width; i += Vec::N) highest = Vec::max(highest, Vec::load(z + i));
  const float top = Vec::top(highest);
  if (top == -kFloatInf) return;
  if (top > part.max) part.rescale(top, moving.move[std::find(z, z + block.n, top) - z]);
  const Vec::F shift = Vec::set(clamped(part.max)), zero = Vec::set(0.0f);
  const Vec::F pivot = Vec::set(static_cast<float>(part.pivot));
  Vec::F total = zero, first = zero, second = zero;
  for (int i = 0; i < block.width; i += Vec::N) {
    const Vec::F e = exp<false>(Vec::load(z + i) - shift), d = Vec::load(moving.move + i) - pivot;
    total = total + e;
    first = Vec::fma(e, d, first);
    second = Vec::fma(e * d, d, second);
  }
  part.z += Vec::sum(total);
  part.first += Vec::sum(first);
  part.second += Vec::sum(second);
  offer_greedy(block, moving, c, z, top, part.greedy);
}

void partition(const Slice& slice, const Constants& constants, const Strengths& strengths,
               Partition* parts) {
  Scratch scratch;
  MovingBlock moving;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    moving.split(block, constants, scratch);
    for (int m = 0; m < strengths.count; ++m) {
      Partition& part = parts[m];
      Constants c = constants;
      c.mu = strengths.mu[m];
      if (std::fabs(part.pivot) > kFloatSafe ||
          moving.largest + std::fabs(c.mu) * moving.reach > kExact || moving.reach > kFloatSafe) {
        partition_exactly(block, c, part);
      } else {
        add_block(block, moving, c, scratch.z, part);
      }
    }
  }
}
