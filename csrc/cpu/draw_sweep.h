// Step 11 over a whole row: the argmax, or the mass of every block, of which one is then read
// again. Included inside an architecture's namespace.

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

// One block of a draw.
struct BlockDraw {
  const Constants& constants;
  const Draw& draw;
  const BlockOperands& block;
  const SteeredBlock& steered;

  double exact(int i) const { return constants.steered_logit(block.w.data[i], block.other_at(i)); }
  bool may_draw(int i) const { return i < block.n && steered.z[i] > -kFloatInf; }
  // Whether the rounding of the floats shows in their exponentials.
  bool rounded() const { return steered.slack * draw.inverse_temperature > 1e-3; }
  float rate() const { return static_cast<float>(std::fmin(draw.inverse_temperature, FLT_MAX)); }
  double exact_top() const {
    double top = -kInf;
    for (int i = 0; i < block.n; ++i) {
      if (may_draw(i)) top = std::fmax(top, exact(i));
    }
    return top;
  }
  double exact_mass(int i, double top) const {
    const double x = may_draw(i) ? (exact(i) - top) * draw.inverse_temperature : -kInf;
    return x < kNoMass ? 0.0 : std::exp(x);
  }
};

inline void draw_greedy(const BlockDraw& s, Best& best) {
  // Whoever is exactly the largest lies within twice the slack of the largest float.
  const double from = std::max<double>(s.steered.top, best.score) - 2.0 * s.steered.slack;
  if (s.steered.top < from || s.steered.top == -kFloatInf) return;
  const Vec::F bound =
      Vec::set(std::max(-FLT_MAX, std::nextafter(static_cast<float>(from), -FLT_MAX)));
  for (int i = 0; i < s.block.width; i += Vec::N) {
    uint32_t hits = Vec::bits(Vec::ge(Vec::load(s.steered.z + i), bound));
    for (; hits; hits &= hits - 1) {
      const int k = i + __builtin_ctz(hits);
      best.offer(s.exact(k), s.block.begin + k);
    }
  }
}

inline MassSum mass_of(const BlockDraw& s) {
  if (s.steered.top == -kFloatInf) return {-kInf, 0};
  if (!s.rounded()) {
    return {s.steered.top, sum_exp(s.steered.z, s.block.width, s.steered.top, s.rate())};
  }
  MassSum mass{s.exact_top(), 0};
  for (int i = 0; i < s.block.n; ++i) mass.sum += s.exact_mass(i, mass.max);
  return mass;
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
              const Draw& draw, const SumsOnTheWay* found, Best& best, MassSum* masses) {
  Scratch scratch;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    if (found && !look_at(slice.row, block, *found)) return;
    SteeredBlock steered = steered_logits(block, constants, scratch);
    filter_block(block, filter, steered, scratch);
    const BlockDraw one{constants, draw, block, steered};
    if (draw.greedy) {
      draw_greedy(one, best);
    } else {
      masses[at / kBlock] = mass_of(one);
    }
  }
}

int token_at(const Slice& slice, const Constants& constants, const RowFilter& filter,
             const Draw& draw, double share) {
  Scratch scratch;
  const BlockOperands block = read_block(slice, slice.begin, scratch);
  SteeredBlock steered = steered_logits(block, constants, scratch);
  filter_block(block, filter, steered, scratch);
  const BlockDraw s{constants, draw, block, steered};
  // First which vector, in float as far as that will do, then which of its tokens.
  const bool rounded = s.rounded();
  const double top = rounded ? s.exact_top() : steered.top;
  const Vec::F shift = Vec::set(steered.top), rate = Vec::set(s.rate());
  double parts[kBlock / Vec::N];
  for (int v = 0; v < block.width / Vec::N; ++v) {
    parts[v] = 0;
    if (!rounded) {
      const float part = Vec::sum(exp((Vec::load(steered.z + v * Vec::N) - shift) * rate));
      parts[v] = part > 1e-26f ? part : 0;  // else its tokens may have none by kNoMass
      continue;
    }
    for (int k = 0; k < Vec::N; ++k) parts[v] += s.exact_mass(v * Vec::N + k, top);
  }
  const Landing vector = land(parts, block.width / Vec::N, share);
  double masses[Vec::N];
  for (int k = 0; k < Vec::N; ++k) masses[k] = s.exact_mass(vector.place * Vec::N + k, top);
  return block.begin + vector.place * Vec::N + land(masses, Vec::N, vector.share).place;
}
