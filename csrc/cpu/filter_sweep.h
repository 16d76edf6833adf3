// Step 10 over a whole row that was swept: the tokens from a bound up, if these are few; else what
// lies above and in a range of steered logits. Included inside an architecture's namespace.

// Part of a block as float, with how far it may be off, padded.
struct Part {
  const float* z;
  int begin, width;
  float slack;
};

inline float below(double bound, float slack) {
  return std::max(-FLT_MAX, std::nextafter(static_cast<float>(bound - slack), -kFloatInf));
}

// Those of a part that are `bound` or more, without their mass.
inline void take(const Part& part, const RowLogits& row, const Constants& c, double bound,
                 std::vector<SteeredToken>& tokens) {
  const Vec::F from = Vec::set(below(bound, part.slack));
  for (int i = 0; i < part.width; i += Vec::N) {
    uint32_t hits = Vec::bits(Vec::ge(Vec::load(part.z + i), from));
    for (; hits; hits &= hits - 1) {
      const int k = i + __builtin_ctz(hits), id = part.begin + k;
      const double z =
          part.slack == 0 ? part.z[k] : c.steered_logit(row.warm_at(id), row.other_at(id));
      if (z >= bound) tokens.push_back({z, id});
    }
  }
}

// Their masses; `exact`: their steered logits are more than floats.
inline void weigh(std::vector<SteeredToken>& tokens, const Draw& draw, float unit, bool exact) {
  if (exact) {
    for (SteeredToken& t : tokens) t.mass = std::exp((t.z - unit) * draw.inverse_temperature);
    return;
  }
  const Vec::F shift = Vec::set(unit), by = Vec::set(std::min(draw.rate() * kLog2E, FLT_MAX));
  alignas(64) float x[Vec::N];
  for (size_t at = 0; at < tokens.size(); at += Vec::N) {
    const int n = static_cast<int>(std::min<size_t>(Vec::N, tokens.size() - at));
    for (int k = 0; k < Vec::N; ++k) x[k] = static_cast<float>(tokens[at + std::min(k, n - 1)].z);
    Vec::store(x, exp2((Vec::load(x) - shift) * by));
    for (int k = 0; k < n; ++k) tokens[at + k].mass = x[k];
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
  const float from = below(bound, tops.slack);
  const int first = slice.begin / kStripe, last = (slice.end + kStripe - 1) / kStripe;
  std::vector<int> stripes(last - first);
  int count = 0;
  for (int i = first; i < last; ++i) {
    stripes[count] = i * kStripe;
    count += tops.of_stripes[i] >= from;
  }
  tokens.clear();
  Scratch scratch;
  SteeredBlock steered{nullptr, 0, 0};
  int block = -1;
  for (int i = 0; i < count; ++i) {
    const int at = stripes[i], n = std::min(kStripe, slice.end - at);
    if (c.direction == kPlain) {  // these floats are exact
      constexpr int kAhead = 3;
      if (i + kAhead < count) prefetch_stripe(row, stripes[i + kAhead]);
      const float* z = fetch(row.warm, row.dtype, at, n, scratch.w);
      take({z, at, padded(n), 0.0f}, row, c, bound, tokens);
    } else {
      if (at / kBlock != block) {
        block = at / kBlock;
        steered = steered_logits(read_block(slice, block * kBlock, scratch), c, scratch);
      }
      take({steered.z + at % kBlock, at, padded(n), steered.slack}, row, c, bound, tokens);
    }
    if (tokens.size() > static_cast<size_t>(kCapacity)) return false;
  }
  weigh(tokens, draw, tops.top, c.direction != kPlain);
  return true;
}

void look_into(const Slice& slice, const Constants& c, const Draw& draw, const Range& range,
               RangeFindings& found, MassSum* above, MassSum* from) {
  Scratch scratch;
  const Vec::F low = Vec::set(range.low), zero = Vec::set(0.0f);
  const Vec::F over = Vec::set(std::nextafter(range.high, kFloatInf));
  float mass[Vec::N];
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    const SteeredBlock s = steered_logits(block, c, scratch);
    MassSum &higher = above[at / kBlock], &all = from[at / kBlock];
    higher = all = {-kInf, 0};
    if (s.top < range.low) continue;
    const BlockDraw one{c, draw, block, s};
    const bool rounded = one.rounded();
    const double top = higher.max = all.max = rounded ? one.exact_top() : s.top;
    const Vec::F shift = Vec::set(s.top);
    const Vec::F rate = Vec::set(std::min(one.rate() * kLog2E, FLT_MAX));
    Vec::F sum_above = zero, sum_from = zero;
    for (int i = 0; i < block.width; i += Vec::N) {
      const Vec::F z = Vec::load(s.z + i);
      const Vec::Mask is_from = Vec::ge(z, low), is_above = Vec::ge(z, over);
      const uint32_t bits_above = Vec::bits(is_above);
      uint32_t inside = Vec::bits(is_from) & ~bits_above;
      found.above += __builtin_popcount(bits_above);
      found.inside += __builtin_popcount(inside);
      if (rounded) {
        for (int k = 0; k < Vec::N; ++k) {
          const bool here = ((inside | bits_above) >> k) & 1;
          const double mass = here ? one.exact_mass(i + k, top) : 0.0;
          all.sum += mass;
          if ((bits_above >> k) & 1) higher.sum += mass;
        }
      } else {
        const Vec::F e = exp2((z - shift) * rate);
        sum_above = sum_above + Vec::select(is_above, e, zero);
        sum_from = sum_from + Vec::select(is_from, e, zero);
        if (inside) Vec::store(mass, e);
      }
      if (found.tokens.size() > static_cast<size_t>(kCapacity)) continue;
      for (; inside; inside &= inside - 1) {
        const int k = __builtin_ctz(inside);
        const double its = rounded ? one.exact_mass(i + k, top) : mass[k];
        found.tokens.push_back({s.z[i + k], block.begin + i + k, its});
      }
    }
    if (rounded) continue;
    higher.sum = Vec::sum(sum_above);
    all.sum = Vec::sum(sum_from);
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
