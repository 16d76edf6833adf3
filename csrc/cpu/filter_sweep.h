// Step 10 over a whole row that was swept: the tokens from a bound up, if these are few; else what
// lies above and in a range of steered logits. Included inside an architecture's namespace.

// Tokens of a block, at first only their steered logits as float.
struct Picked {
  alignas(64) float z[kBlock + Vec::N], id[kBlock + Vec::N];  // ids as bits
  int count;

  int id_at(int i) const { return static_cast<int>(float_bits(id[i])); }
};

// Those from `low` to below `over`. With kSparse most vectors have none of them; else there is no
// branch a vector, which would be foretold badly.
template <bool kSparse>
inline void pick(const float* z, int begin, int width, Vec::F low, Vec::F over, Picked& to) {
  to.count = 0;
  for (int i = 0; i < width; i += Vec::N) {
    const Vec::F x = Vec::load(z + i);
    const uint32_t bits = Vec::bits(Vec::ge(x, low)) & ~Vec::bits(Vec::ge(x, over));
    if (kSparse && !bits) continue;
    Vec::store(to.z + to.count, Vec::squeeze(x, bits));
    Vec::store(to.id + to.count, Vec::squeeze(Vec::count_up(begin + i), bits));
    to.count += __builtin_popcount(bits);
  }
}

// Appends what was picked, with masses from these floats.
inline void append(const Picked& picked, const Draw& draw, double unit,
                   std::vector<SteeredToken>& tokens) {
  const float rounded = static_cast<float>(unit);
  const double factor =
      rounded == unit ? 1.0 : std::exp((rounded - unit) * draw.inverse_temperature);
  const Vec::F shift = Vec::set(rounded), by = base2(draw.rate());
  alignas(64) float mass[Vec::N];
  SteeredToken some[Vec::N];
  for (int i = 0; i < picked.count; i += Vec::N) {
    const int n = std::min(Vec::N, picked.count - i);
    Vec::store(mass, exp2((Vec::load(picked.z + i) - shift) * by));
    for (int k = 0; k < n; ++k) some[k] = {picked.z[i + k], picked.id_at(i + k), mass[k] * factor};
    tokens.insert(tokens.end(), some, some + n);
  }
}

inline void prefetch_stripe(const RowLogits& row, int at) {
  const size_t size = row.dtype == DType::kFloat ? 4 : 2;
  const char* p = static_cast<const char*>(row.warm) + at * size;
  for (size_t i = 0; i < kStripe * size; i += 64) __builtin_prefetch(p + i);
}

bool gather(const Slice& slice, const Constants& c, const Draw& draw, const Tops& tops,
            double bound, std::vector<SteeredToken>& tokens) {
  const RowLogits& row = slice.row;
  const float from = below(bound - tops.slack);
  const int first = slice.begin / kStripe, last = (slice.end + kStripe - 1) / kStripe;
  std::vector<int> stripes(last - first);
  int count = 0;
  for (int i = first; i < last; ++i) {
    stripes[count] = i * kStripe;
    count += tops.of_stripes[i] >= from;
  }
  tokens.clear();
  Scratch scratch;
  Picked picked;
  SteeredBlock steered{nullptr, 0, 0};
  int block = -1;
  const Vec::F never = Vec::set(kFloatInf);
  for (int i = 0; i < count; ++i) {
    const int at = stripes[i], n = std::min(kStripe, slice.end - at);
    if (c.direction == kPlain) {  // these floats are exact
      constexpr int kAhead = 3;
      if (i + kAhead < count) prefetch_stripe(row, stripes[i + kAhead]);
      const float* z = fetch_logits(row, row.warm, at, n, scratch.w);
      pick<true>(z, at, padded(n), Vec::set(from), never, picked);
      append(picked, draw, tops.top, tokens);
    } else {
      if (at / kBlock != block) {
        block = at / kBlock;
        steered = steered_logits(read_block(slice, block * kBlock, scratch), c, scratch);
      }
      const Vec::F low = Vec::set(below(bound - steered.slack));
      pick<true>(steered.z + at % kBlock, at, padded(n), low, never, picked);
      for (int k = 0; k < picked.count; ++k) {
        const int id = picked.id_at(k);
        const double z = c.steered_logit(row.warm_at(id), row.other_at(id));
        if (z >= bound)
          tokens.push_back({z, id, std::exp((z - tops.top) * draw.inverse_temperature)});
      }
    }
    if (tokens.size() > static_cast<size_t>(kCapacity)) return false;
  }
  return true;
}

// The bounds of a range as the vector loops take them: what is above is `over` or more.
struct RangeBounds {
  Vec::F low, over;
  explicit RangeBounds(const Range& range)
      : low(Vec::set(range.low)), over(Vec::set(std::nextafter(range.high, kFloatInf))) {}
};

// Those of a block inside the range.
inline void list(const BlockDraw& one, const RangeBounds& range, double unit,
                 std::vector<SteeredToken>& tokens) {
  const int begin = one.block.begin;
  Picked picked;
  pick<false>(one.steered.z, begin, one.block.width, range.low, range.over, picked);
  if (!one.rounded()) return append(picked, one.draw, unit, tokens);
  for (int i = 0; i < picked.count; ++i) {
    const int id = picked.id_at(i);
    tokens.push_back({picked.z[i], id, one.exact_mass(id - begin, unit)});
  }
}

// What a block has above the range, and from its low end up: masses in the unit of its top,
// numbers.
struct BlockShares {
  double mass_above = 0, mass_from = 0;
  int above = 0, from = 0;
};

inline BlockShares shares_of(const BlockDraw& one, const RangeBounds& range, double top) {
  BlockShares all;
  const bool rounded = one.rounded();
  const Vec::F shift = Vec::set(one.steered.top), zero = Vec::set(0.0f);
  const Vec::F by = base2(one.rate());
  Vec::F sum_above = zero, sum_from = zero;
  for (int i = 0; i < one.block.width; i += Vec::N) {
    const Vec::F z = Vec::load(one.steered.z + i);
    const Vec::Mask is_from = Vec::ge(z, range.low), is_above = Vec::ge(z, range.over);
    all.from += __builtin_popcount(Vec::bits(is_from));
    all.above += __builtin_popcount(Vec::bits(is_above));
    if (!rounded) {
      const Vec::F e = Vec::select(is_from, exp2((z - shift) * by), zero);
      sum_from = sum_from + e;
      sum_above = sum_above + Vec::select(is_above, e, zero);
      continue;
    }
    for (uint32_t rest = Vec::bits(is_from); rest; rest &= rest - 1) {
      const int k = __builtin_ctz(rest);
      const double mass = one.exact_mass(i + k, top);
      all.mass_from += mass;
      if ((Vec::bits(is_above) >> k) & 1) all.mass_above += mass;
    }
  }
  if (!rounded) {
    all.mass_from = Vec::sum(sum_from);
    all.mass_above = Vec::sum(sum_above);
  }
  return all;
}

void look_into(const Slice& slice, const Constants& c, const Draw& draw, const Range& range,
               RangeFindings& found, MassSum* above, MassSum* from) {
  Scratch scratch;
  const RangeBounds bounds(range);
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    const SteeredBlock s = steered_logits(block, c, scratch);
    above[at / kBlock] = from[at / kBlock] = {-kInf, 0};
    if (s.top < range.low) continue;
    const BlockDraw one{c, draw, block, s};
    const double top = one.rounded() ? one.exact_top() : s.top;
    const BlockShares shares = shares_of(one, bounds, top);
    above[at / kBlock] = {top, shares.mass_above};
    from[at / kBlock] = {top, shares.mass_from};
    found.above += shares.above;
    found.inside += shares.from - shares.above;
    if (shares.from > shares.above && found.tokens.size() <= static_cast<size_t>(kCapacity)) {
      list(one, bounds, range.unit, found.tokens);
    }
  }
}

int nth_tie(const Slice& slice, const Constants& c, float tie, int64_t n) {
  Scratch scratch;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    const SteeredBlock s = steered_logits(block, c, scratch);
    if (s.top < tie) continue;
    for (int i = 0; i < block.n; ++i) {
      if (s.z[i] == tie && --n == 0) return block.begin + i;
    }
  }
  return -1;
}
