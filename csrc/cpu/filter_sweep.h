// Step 10 over a whole row: the sweeps that top-k and top-p need. Included inside an architecture's
// namespace.

// Calls f(block, its steered logits) for the blocks of a slice until that returns false.
template <typename F>
inline void for_steered_blocks(const Slice& slice, const Constants& c, const F& f) {
  Scratch scratch;
  for (int at = slice.begin; at < slice.end; at += kBlock) {
    const BlockOperands block = read_block(slice, at, scratch);
    if (!f(block, steered_logits(block, c, scratch))) return;
  }
}

void histogram(const Slice& slice, const Constants& c, const Binning& b, Histogram& to) {
  const int width = b.width();
  for_steered_blocks(slice, c, [&](const BlockOperands& block, const SteeredBlock& s) {
    for (int i = 0; i < block.n; ++i) {
      if (s.z[i] == -kFloatInf) continue;
      const uint32_t key = ordered_key(s.z[i]);
      if (key < b.floor_key || (static_cast<uint64_t>(key) >> (b.shift + width)) != b.prefix) {
        continue;
      }
      const uint32_t bin = (key >> b.shift) & ((1u << width) - 1);
      ++to.count[bin];
      to.mass[bin] += std::exp(static_cast<float>((s.z[i] - b.top) * b.inverse_temperature));
    }
    return true;
  });
}

void gather(const Slice& slice, const Constants& c, uint32_t floor_key,
            std::vector<Candidate>& out) {
  const float floor = key_value(floor_key);
  for_steered_blocks(slice, c, [&](const BlockOperands& block, const SteeredBlock& s) {
    for (int i = 0; i < block.n && !(s.top < floor); ++i) {
      if (s.z[i] < floor || s.z[i] == -kFloatInf) continue;
      out.push_back({block.begin + i, block.w.data[i], block.other_at(i)});
    }
    return true;
  });
}

int nth_tie(const Slice& slice, const Constants& c, uint32_t key, int64_t n) {
  int id = -1;
  for_steered_blocks(slice, c, [&](const BlockOperands& block, const SteeredBlock& s) {
    for (int i = 0; i < block.n; ++i) {
      if (ordered_key(s.z[i]) != key || --n > 0) continue;
      id = block.begin + i;
      return false;
    }
    return true;
  });
  return id;
}
