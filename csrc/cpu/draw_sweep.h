// Step 11 over a whole row: the argmax, the mass of every block, of which one is then read again,
// and for step 10 the largest of every stripe. Included inside an architecture's namespace.

// Takes out what the filter does not keep.
inline void filter_block(const BlockOperands& block, const RowFilter& filter, SteeredBlock& s,
                         Scratch& scratch) {
  if (filter.floor == -kFloatInf) return;
  const int best = filter.best - block.begin, last_tie = filter.last_tie - block.begin;
  const bool has_best = best >= 0 && best < block.n;
  const float best_z = has_best ? s.z[best] : 0.0f;
  const float floor = last_tie < 0 ? std::nextafter(filter.floor, kFloatInf) : filter.floor;
  const Vec::F least = Vec::set(floor), gone = Vec::set(-kFloatInf);
  Vec::F top = gone;
  for (int i = 0; i < block.width; i += Vec::N) {
    const Vec::F z = Vec::load(s.z + i), kept = Vec::select(Vec::ge(z, least), z, gone);
    Vec::store(scratch.z + i, kept);
    top = Vec::max(top, kept);
  }
  s.z = scratch.z;
  s.top = Vec::top(top);
  if (last_tie >= 0 && last_tie < block.n) {
    for (int i = last_tie + 1; i < block.n; ++i) {
      if (scratch.z[i] == floor) scratch.z[i] = -kFloatInf;
    }
    s.top = *std::max_element(scratch.z, scratch.z + block.n);
  }
  if (has_best) {
    scratch.z[best] = best_z;
    s.top = std::max(s.top, best_z);
  }
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
  float rate() const { return draw.rate(); }
  // Calls f(place) for what lies at most this far below the largest float, and what may, rounded.
  template <typename F>
  void for_each_near(double depth, const F& f) const {
    const Vec::F from = Vec::set(below(steered.top - depth - 2.0 * steered.slack));
    for (int i = 0; i < block.width; i += Vec::N) {
      uint32_t hits = Vec::bits(Vec::ge(Vec::load(steered.z + i), from));
      for (; hits; hits &= hits - 1) f(i + __builtin_ctz(hits));
    }
  }
  double exact_top() const {
    double top = -kInf;
    for_each_near(0, [&](int i) { top = std::fmax(top, exact(i)); });
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
  const Vec::F bound = Vec::set(below(from));
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
  s.for_each_near(-kNoMass / s.draw.inverse_temperature,
                  [&](int i) { mass.sum += s.exact_mass(i, mass.max); });
  return mass;
}

inline void note_tops(const float* z, int width, float* tops) {
  for (int at = 0; at < width; at += kStripe) {
    const int end = std::min(at + kStripe, width);
    Vec::F top0 = Vec::load(z + at), top1 = Vec::load(z + at + Vec::N);
    for (int i = at + 2 * Vec::N; i < end; i += 2 * Vec::N) {
      top0 = Vec::max(top0, Vec::load(z + i));
      top1 = Vec::max(top1, Vec::load(z + i + Vec::N));
    }
    tops[at / kStripe] = Vec::top(Vec::max(top0, top1));
  }
}

// A whole block of a plain row at one look: its mass relative to the maximum so far, and its tops.
// Refuses (false) the first block, and one with NaN, +inf or a maximum that leaps up.
inline bool weigh_once(const Slice& slice, int at, const Draw& draw, Scratch& scratch, Sums& sums,
                       const Drawn& to) {
  constexpr float kLeap = 16;  // exp(16) * kBlock is far from float's limits
  if (slice.end - at < kBlock || sums.max_w == -kInf) return false;
  if (none_allowed(slice.row, at, kBlock)) {
    to.masses[at / kBlock] = {-kInf, 0};
    if (to.tops) std::fill_n(to.tops + at / kStripe, kBlock / kStripe, -kFloatInf);
    return true;
  }
  const float* z = fetch_logits(slice.row, slice.row.warm, at, kBlock, scratch.w);
  const int ahead = ahead_of(slice, at);
  const float max = static_cast<float>(sums.max_w), rate = draw.rate();
  const Vec::F shift = Vec::set(max), by = base2(rate);
  Vec::F sum0 = Vec::set(0.0f), sum1 = sum0, top = shift;
  float tops[kBlock / kStripe];
  for (int stripe = 0; stripe < kBlock / kStripe; ++stripe) {
    const float* x = z + stripe * kStripe;
    Vec::F top0 = Vec::load(x), top1 = top0;
    for (int i = 0; i < kStripe; i += 2 * Vec::N) {
      __builtin_prefetch(x + i + ahead);
      const Vec::F a = Vec::load(x + i), b = Vec::load(x + i + Vec::N);
      top0 = Vec::max(top0, a);
      top1 = Vec::max(top1, b);
      sum0 = sum0 + exp2((a - shift) * by);
      sum1 = sum1 + exp2((b - shift) * by);
    }
    top0 = Vec::max(top0, top1);
    top = Vec::max(top, top0);
    if (to.tops) tops[stripe] = Vec::top(top0);
  }
  const float largest = Vec::top(top), sum = Vec::sum(sum0 + sum1);
  if (!(sum < kFloatInf) || !((largest - max) * rate < kLeap)) return false;
  sums.max_w = largest;
  to.masses[at / kBlock] = {max, sum};
  if (to.tops) std::copy(tops, tops + kBlock / kStripe, to.tops + at / kStripe);
  return true;
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
              const Draw& draw, const SumsOnTheWay* found, const Drawn& to) {
  Scratch scratch;
  const bool at_once = constants.direction == kPlain && found && !found->all && to.masses &&
                       !to.best && filter.floor == -kFloatInf;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    if (at_once && weigh_once(slice, at, draw, scratch, found->sums, to)) continue;
    const BlockOperands block = read_block(slice, at, scratch);
    if (found && !look_at(slice.row, block, *found)) return;
    SteeredBlock steered = steered_logits(block, constants, scratch);
    filter_block(block, filter, steered, scratch);
    const BlockDraw one{constants, draw, block, steered};
    if (to.best) draw_greedy(one, *to.best);
    if (to.masses) to.masses[at / kBlock] = mass_of(one);
    if (to.tops) {
      note_tops(steered.z, block.width, to.tops + at / kStripe);
      *to.slack = std::max(*to.slack, steered.slack);
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
