// Step 10 over a whole row: the sweeps that top-k and top-p need. Included inside an architecture's
// namespace.

void histogram(const Slice& slice, const Constants& c, const Binning& binning, Histogram& to) {
  Scratch scratch;
  const Binning b = binning;  // which `to` might alias
  const int above = b.shift + b.width();
  const uint32_t mask = (1u << b.width()) - 1;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    const SteeredBlock s = steered_logits(block, c, scratch);
    for (int i = 0; i < block.n; ++i) {
      if (s.z[i] == -kFloatInf) continue;
      const uint32_t key = ordered_key(s.z[i]);
      if (key < b.floor_key || (static_cast<uint64_t>(key) >> above) != b.prefix) continue;
      const uint32_t bin = (key >> b.shift) & mask;
      ++to.count[bin];
      to.mass[bin] += std::exp(static_cast<float>((s.z[i] - b.top) * b.inverse_temperature));
    }
  }
}

void gather(const Slice& slice, const Constants& c, uint32_t floor_key,
            std::vector<Candidate>& out) {
  Scratch scratch;
  const float floor = key_value(floor_key);
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    const SteeredBlock s = steered_logits(block, c, scratch);
    if (s.top < floor) continue;
    for (int i = 0; i < block.n; ++i) {
      if (s.z[i] < floor || s.z[i] == -kFloatInf) continue;
      out.push_back({block.begin + i, block.w.data[i], block.other_at(i)});
    }
  }
}

int nth_tie(const Slice& slice, const Constants& c, uint32_t key, int64_t n) {
  Scratch scratch;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    const SteeredBlock s = steered_logits(block, c, scratch);
    for (int i = 0; i < block.n; ++i) {
      if (ordered_key(s.z[i]) == key && --n == 0) return block.begin + i;
    }
  }
  return -1;
}
