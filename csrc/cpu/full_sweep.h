// The rarer sweeps: the partition function on a grid of strengths, and what top-k and top-p need
// when the whole vocabulary is in play. Included inside an architecture's namespace.

// What moves with mu in a block, and what does not: z_hat = still + mu * move. Tokens that cannot
// be drawn have still = -inf and move = 0.
inline void split_block(const Pair& pair, const Constants& c, Space& space, float* still,
                        float* move) {
  const bool drop = c.penalty == -kInf;
  const float outside = drop ? 0.0f : static_cast<float>(c.penalty);
  const FloatConstants f(c);
  const bool simple = pair.fast && pair.width == pair.n && c.direction != kPlain && !f.huge;
  const float* delta = simple ? deltas(pair, c.direction, f, space) : nullptr;
  for (int i = 0; i < pair.n; ++i) {
    const float w = pair.w.data[i];
    const bool in = simple ? w >= f.inside_from : c.in_confidence_set(w);
    const bool dead = in ? false : drop || w == -std::numeric_limits<float>::infinity();
    still[i] = dead ? -std::numeric_limits<float>::infinity() : w;
    move[i] = dead     ? 0.0f
              : !in    ? outside
              : simple ? delta[i]
                       : clamped(c.delta_of(w, pair.other.data ? pair.other.data[i] : 0.0f));
  }
  for (int i = pair.n; i < pair.width; ++i) {
    still[i] = -std::numeric_limits<float>::infinity();
    move[i] = 0.0f;
  }
}

// Steered logits above this are summed in double: float would round 1e-3 and more away.
constexpr double kExact = 1e4;

// One block at one strength in double.
inline void partition_exactly(const Pair& pair, const Constants& c, Partition& part) {
  auto other = [&](int i) { return pair.other.data ? pair.other.data[i] : 0.0f; };
  auto moves = [&](int i) {
    return c.in_confidence_set(pair.w.data[i]) ? c.delta_of(pair.w.data[i], other(i)) : c.penalty;
  };
  double top = -kInf;
  int at = 0;
  for (int i = 0; i < pair.n; ++i) {
    const double z = c.steered_logit(pair.w.data[i], other(i));
    if (z > top) top = z, at = i;
  }
  if (top == -kInf) return;
  if (top > part.max) part.rescale(top, moves(at));
  for (int i = 0; i < pair.n; ++i) {
    const double z = c.steered_logit(pair.w.data[i], other(i));
    if (z == -kInf) continue;
    part.add(std::exp(z - part.max), moves(i));
    if (c.in_confidence_set(pair.w.data[i])) part.greedy.offer(z, pair.begin + i);
  }
}

void sweep_partition(const Row& row, int begin, int end, const Constants& context,
                     const double* strengths, int count, Partition* parts) {
  Space space;
  alignas(64) float still[kBlock], move[kBlock];
  for (int at = begin; at < end; at += kBlock) {
    const Pair pair = read_pair(row, at, end, space);
    split_block(pair, context, space, still, move);
    float reach = 0, largest = 0;
    for (int i = 0; i < pair.n; ++i) {
      reach = std::max(reach, std::fabs(move[i]));
      if (still[i] != -std::numeric_limits<float>::infinity()) {
        largest = std::max(largest, std::fabs(still[i]));
      }
    }
    const float size = pair.fast ? pair.w.magnitude + pair.other.magnitude : 1.0f;
    const float from = static_cast<float>(context.max_w + context.log_alpha);
    for (int m = 0; m < count; ++m) {
      Partition& part = parts[m];
      Constants c = context;
      c.mu = strengths[m];
      if (std::fabs(part.pivot) > kHuge || largest + std::fabs(c.mu) * reach > kExact ||
          reach > kHuge) {
        partition_exactly(pair, c, part);
        continue;
      }
      float* z = space.z;
      const Vec::F mu = Vec::set(static_cast<float>(c.mu));
      for (int i = 0; i < pair.width; i += Vec::N) {
        Vec::store(z + i, Vec::fma(mu, Vec::load(move + i), Vec::load(still + i)));
      }
      Vec::F highest = Vec::load(z);
      for (int i = Vec::N; i < pair.width; i += Vec::N)
        highest = Vec::max(highest, Vec::load(z + i));
      const float top = Vec::top(highest);
      if (top == -std::numeric_limits<float>::infinity()) continue;
      if (top > part.max) part.rescale(top, move[std::find(z, z + pair.n, top) - z]);
      const Vec::F shift = Vec::set(clamped(part.max)), zero = Vec::set(0.0f);
      const Vec::F pivot = Vec::set(static_cast<float>(part.pivot));
      Vec::F total = zero, first = zero, second = zero;
      for (int i = 0; i < pair.width; i += Vec::N) {
        const Vec::F e = exp<false>(Vec::load(z + i) - shift), d = Vec::load(move + i) - pivot;
        total = total + e;
        first = Vec::fma(e, d, first);
        second = Vec::fma(e * d, d, second);
      }
      part.z += Vec::sum(total);
      part.first += Vec::sum(first);
      part.second += Vec::sum(second);

      // The greedy token is looked for on C alone.
      const float slack = 1e-6f * static_cast<float>(1 + (1 + std::fabs(c.mu)) * (size + reach));
      const float need = static_cast<float>(part.greedy.score) - 2 * slack;
      if (top < need) continue;
      float inside_top = -std::numeric_limits<float>::infinity();
      for (int i = 0; i < pair.n; ++i) {
        if (pair.w.data[i] >= from && still[i] != -std::numeric_limits<float>::infinity()) {
          inside_top = std::max(inside_top, z[i]);
        }
      }
      for (int i = 0; i < pair.n; ++i) {
        if (z[i] < std::max(need, inside_top - 2 * slack) ||
            !context.in_confidence_set(pair.w.data[i]))
          continue;
        const float other = pair.other.data ? pair.other.data[i] : 0.0f;
        part.greedy.offer(c.steered_logit(pair.w.data[i], other), pair.begin + i);
      }
    }
  }
}

inline Steered steered_block(const Row& row, int at, int end, const Constants& c, Space& space,
                             Pair& pair) {
  pair = read_pair(row, at, end, space);
  return steer(pair, c, space);
}

void sweep_histogram(const Row& row, int begin, int end, const Constants& context,
                     uint32_t floor_key, int shift, uint32_t prefix, double top,
                     double inverse_temperature, Histogram& histogram) {
  Space space;
  Pair pair;
  const int width = shift == 0 ? 10 : 11;
  const float lowest = -std::numeric_limits<float>::infinity();
  for (int at = begin; at < end; at += kBlock) {
    const Steered s = steered_block(row, at, end, context, space, pair);
    for (int i = 0; i < pair.n; ++i) {
      if (s.z[i] == lowest) continue;
      const uint32_t key = ordered_key(s.z[i]);
      if (key < floor_key || (static_cast<uint64_t>(key) >> (shift + width)) != prefix) continue;
      const uint32_t bin = (key >> shift) & ((1u << width) - 1);
      ++histogram.count[bin];
      histogram.mass[bin] += std::exp(static_cast<float>((s.z[i] - top) * inverse_temperature));
    }
  }
}

void sweep_gather(const Row& row, int begin, int end, const Constants& context, uint32_t floor_key,
                  std::vector<Candidate>& out) {
  Space space;
  Pair pair;
  const float floor = key_value(floor_key);
  for (int at = begin; at < end; at += kBlock) {
    const Steered s = steered_block(row, at, end, context, space, pair);
    if (s.top < floor) continue;
    for (int i = 0; i < pair.n; ++i) {
      if (s.z[i] < floor || s.z[i] == -std::numeric_limits<float>::infinity()) continue;
      out.push_back({pair.begin + i, pair.w.data[i], pair.other.data ? pair.other.data[i] : 0.0f});
    }
  }
}

int sweep_nth_tie(const Row& row, int begin, int end, const Constants& context, uint32_t key,
                  int64_t wanted, int64_t& seen) {
  Space space;
  Pair pair;
  for (int at = begin; at < end; at += kBlock) {
    const Steered s = steered_block(row, at, end, context, space, pair);
    for (int i = 0; i < pair.n; ++i) {
      if (ordered_key(s.z[i]) == key && ++seen == wanted) return at + i;
    }
  }
  return -1;
}
