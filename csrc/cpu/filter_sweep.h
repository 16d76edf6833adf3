// Step 10 over a whole row whose filters keep more than a list holds: what lies above and in a
// range of steered logits. Included inside an architecture's namespace.

void look_into(const Slice& slice, const Constants& c, const Draw& draw, const Range& range,
               RangeFindings& found, MassSum* above, MassSum* from) {
  Scratch scratch;
  const Vec::F low = Vec::set(range.low), zero = Vec::set(0.0f);
  const Vec::F over = Vec::set(std::nextafter(range.high, kFloatInf));
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    const SteeredBlock s = steered_logits(block, c, scratch);
    MassSum &higher = above[at / kBlock], &all = from[at / kBlock];
    higher = all = {-kInf, 0};
    if (s.top < range.low) continue;
    const BlockDraw one{c, draw, block, s};
    const bool rounded = one.rounded();
    const double top = higher.max = all.max = rounded ? one.exact_top() : s.top;
    const Vec::F shift = Vec::set(s.top), rate = Vec::set(one.rate());
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
        const Vec::F e = exp((z - shift) * rate);
        sum_above = sum_above + Vec::select(is_above, e, zero);
        sum_from = sum_from + Vec::select(is_from, e, zero);
      }
      if (found.tokens.size() > static_cast<size_t>(kCapacity)) continue;
      for (; inside; inside &= inside - 1) {
        const int k = i + __builtin_ctz(inside);
        found.tokens.push_back({s.z[k], block.begin + k});
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
