// Step 2, the first sweep: sums and candidates of a slice, reading each logit once, block by block.
// Included inside an architecture's namespace.

struct Scratch {
  alignas(64) float w[kBlock], other[kBlock], z[kBlock], extra[kBlock];
};

// One block of a row with both operands in L1.
struct BlockOperands {
  int begin, n, width;  // first token, tokens, tokens with padding
  Block w, other;       // other.data is null for a plain row
  bool ordinary;        // nothing exceptional: the vector loops may run unmasked
  Exceptional exceptional;

  float other_at(int i) const { return other.data ? other.data[i] : 0.0f; }
};

// How many tokens ahead a sweep of floats is to ask for, a line at a time as it goes: the
// arithmetic leaves the memory idle, the hardware prefetcher stops at page ends, and a block at
// once would fill the queue of misses. 0 at the end of the row. (16-bit operands gain nothing:
// bench/NOTES.md.)
inline int ahead_of(const Slice& slice, int at) {
  return slice.row.dtype == DType::kFloat && at + 2 * kBlock <= slice.row.vocab ? kBlock : 0;
}

// The block of a slice that begins at token `at`.
inline BlockOperands read_block(const Slice& slice, int at, Scratch& scratch) {
  const RowLogits& row = slice.row;
  BlockOperands block;
  block.begin = at;
  block.n = std::min(kBlock, slice.end - at);
  block.width = padded(block.n);
  const int ahead = ahead_of(slice, at);
  block.other = Block{nullptr, 0, 0, true};
  if (none_allowed(row, at, block.n)) {
    std::fill(scratch.w, scratch.w + block.width, -kFloatInf);
    block.w = Block{scratch.w, -kFloatInf, 0, false};
    if (row.base) block.other = block.w;
  } else {
    block.w =
        scan(fetch_logits(row, row.warm, at, block.n, scratch.w), block.width, block.n, ahead);
    if (row.base) {
      const float* x = fetch_logits(row, row.base, at, block.n, scratch.other);
      block.other = scan(x, block.width, block.n, ahead);
    }
  }
  if (row.vector) {
    const float* x = fetch(row.vector, DType::kFloat, at, block.n, scratch.other);
    block.other = scan(x, block.width, block.n, ahead);
  }
  block.ordinary = block.w.finite && block.other.finite;
  if (!block.ordinary) {
    block.exceptional = classify(block.w.data, block.other.data, block.n, row.vector != nullptr);
  }
  return block;
}

// The same sums where products overflow float.
inline void add_exactly(const BlockOperands& block, Sums& s) {
  for (int i = 0; i < block.n; ++i) {
    const double w = block.w.data[i], b = block.other.data[i];
    const double e = w == -kInf ? 0.0 : std::exp(w - s.max_w);
    s.z_w += e;
    if (b == -kInf) continue;
    s.z_b += std::exp(b - s.max_b);
    s.usable += e;
    if (e != 0) s.cross += e * ((w - s.max_w) - (b - s.max_b));
  }
}

inline void add(const BlockSums& block, Sums& s) {
  s.z_w += block.z_w;
  s.z_b += block.z_b;
  s.usable += block.usable;
  s.cross += block.cross;
}

// Adds a block to the sums; false when the row is invalid.
inline bool accumulate(const RowLogits& row, const BlockOperands& block, Sums& s) {
  const Exceptional& exceptional = block.exceptional;
  s.invalid |= exceptional.invalid;
  s.base_masked |= exceptional.base_masked;
  if (s.invalid) return false;
  s.n_finite += exceptional.any ? exceptional.n_finite : block.n;
  const double top_w = std::max<double>(s.max_w, block.w.top);
  const double top_b = row.base ? std::max<double>(s.max_b, block.other.top) : s.max_b;
  if (top_w > s.max_w || top_b > s.max_b) s.rescale(top_w, top_b);
  const float max_w = static_cast<float>(s.max_w), max_b = static_cast<float>(s.max_b);
  if (!row.base) {
    if (block.w.top > -kInf) s.z_w += sum_exp(block.w.data, block.width, max_w, 1.0f);
  } else if (exceptional.beyond_float || std::fabs(max_w) > kFloatSafe ||
             std::fabs(max_b) > kFloatSafe) {
    add_exactly(block, s);
  } else {
    const bool minus_inf = !block.ordinary || block.width != block.n;
    add(minus_inf ? block_sums<true>(block.w.data, block.other.data, block.width, max_w, max_b)
                  : block_sums<false>(block.w.data, block.other.data, block.width, max_w, max_b),
        s);
  }
  return true;
}

// One look at a whole block, relative to the maxima so far. Refuses (false, nothing added) what is
// not an ordinary block: the first one, one with anything not finite, or a maximum that leaps up.
inline bool accumulate_once(const Slice& slice, int at, Scratch& scratch, Sums& s,
                            BlockOperands& block) {
  constexpr double kLeap = 16;  // exp(16) * kBlock is far from float's limits
  const RowLogits& row = slice.row;
  if (!row.base || slice.end - at < kBlock || s.max_w == -kInf || s.max_b == -kInf) return false;
  if (row.allowed) return false;  // hardly a block of such a row is without -inf
  const float* w = fetch_logits(row, row.warm, at, kBlock, scratch.w);
  const float* b = fetch_logits(row, row.base, at, kBlock, scratch.other);
  const BlockSums sums = block_sums<false>(w, b, kBlock, static_cast<float>(s.max_w),
                                           static_cast<float>(s.max_b), ahead_of(slice, at));
  const bool finite =
      std::isfinite(sums.z_w) && std::isfinite(sums.z_b) && std::isfinite(sums.cross);
  if (!finite || sums.top_w > s.max_w + kLeap || sums.top_b > s.max_b + kLeap) return false;
  add(sums, s);
  s.n_finite += kBlock;
  if (sums.top_w > s.max_w || sums.top_b > s.max_b) {
    s.rescale(std::max<double>(s.max_w, sums.top_w), std::max<double>(s.max_b, sums.top_b));
  }
  block.begin = at;
  block.n = block.width = kBlock;
  block.w = Block{w, sums.top_w, 0, true};
  block.other = Block{b, sums.top_b, 0, true};
  return true;
}

inline void collect(const BlockOperands& block, double threshold, Candidates& candidates) {
  const float from = below(threshold);
  if (block.w.top < from) return;
  const Vec::F bound = Vec::set(from);
  std::vector<Candidate>& tokens = candidates.tokens;
  for (int i = 0; i < block.width; i += Vec::N) {
    uint32_t hits = Vec::bits(Vec::ge(Vec::load(block.w.data + i), bound));
    for (; hits; hits &= hits - 1) {
      const int k = i + __builtin_ctz(hits);
      if (tokens.size() == static_cast<size_t>(kCapacity)) {
        // The maximum has risen since the first ones came in; see what is still near it.
        tokens.erase(std::remove_if(tokens.begin(), tokens.end(),
                                    [from](const Candidate& c) { return c.warm < from; }),
                     tokens.end());
        if (tokens.size() > static_cast<size_t>(kCapacity) / 2) {
          candidates.overflow = true;
          return;
        }
      }
      tokens.push_back({block.begin + k, block.w.data[k], block.other_at(k)});
    }
  }
}

void first_sweep(const Slice& slice, double log_alpha, Sums& s, Candidates* candidates) {
  Scratch scratch;
  if (candidates && log_alpha == -kInf && slice.row.vocab > kCapacity) candidates->overflow = true;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    BlockOperands block;
    if (!accumulate_once(slice, at, scratch, s, block)) {
      block = read_block(slice, at, scratch);
      if (!accumulate(slice.row, block, s)) return;
    }
    if (candidates && !candidates->overflow) collect(block, s.max_w + log_alpha, *candidates);
  }
}
