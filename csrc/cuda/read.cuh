// Reading rows 16 bytes at a time. The token a thread reads never depends on the row's alignment,
// so neither do the sums: rows that do not start on 16 bytes are put together from two loads.
#pragma once
#include "arguments.cuh"
#include "platform.cuh"

namespace svdk::cuda {

template <typename T>
struct Stream {
  const T* row;
  int vocab;
  uint32_t shift;  // bytes that the row starts past a 16-byte boundary
};

template <typename T>
struct Stream<Adjusted<T>> {
  Stream<T> logits;
  const float* bias;        // or null
  const uint32_t* bitmask;  // or null

  // The bits of tokens `id` and on, up to the next multiple of 32.
  SVDK_DEVICE uint32_t allowed_from(int id) const {
    return bitmask ? bitmask[id >> 5] >> (id & 31) : ~0u;
  }
};

template <typename T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr uint32_t kMinusInf = 0xff800000u;
};
template <>
struct Traits<BFloat16> {
  static constexpr uint32_t kMinusInf = 0xff80u;
};
template <>
struct Traits<Half> {
  static constexpr uint32_t kMinusInf = 0xfc00u;
};

SVDK_DEVICE uint32_t raw(const float* p) { return bits_of(*p); }
SVDK_DEVICE uint32_t raw(const BFloat16* p) { return p->bits; }
SVDK_DEVICE uint32_t raw(const Half* p) { return p->bits; }

template <typename T>
SVDK_DEVICE float decode(uint32_t bits);
template <>
SVDK_DEVICE float decode<float>(uint32_t bits) {
  return float_of(bits);
}
template <>
SVDK_DEVICE float decode<BFloat16>(uint32_t bits) {
  return float_of(bits << 16);
}
template <>
SVDK_DEVICE float decode<Half>(uint32_t bits) {
  return half_to_float(static_cast<uint16_t>(bits));
}

// The larger values of two words, place by place.
template <typename T>
SVDK_DEVICE uint32_t max_word(uint32_t a, uint32_t b);
template <>
SVDK_DEVICE uint32_t max_word<float>(uint32_t a, uint32_t b) {
  return bits_of(fmaxf(float_of(a), float_of(b)));
}
template <>
SVDK_DEVICE uint32_t max_word<BFloat16>(uint32_t a, uint32_t b) {
  return max_bfloat16x2(a, b);
}
template <>
SVDK_DEVICE uint32_t max_word<Half>(uint32_t a, uint32_t b) {
  return max_halfx2(a, b);
}

// The nearest value of a type, into memory.
SVDK_DEVICE void encode(float x, float* to) { *to = x; }
SVDK_DEVICE void encode(float x, BFloat16* to) { to->bits = float_to_bfloat16(x); }
SVDK_DEVICE void encode(float x, Half* to) { to->bits = float_to_half(x); }

template <typename T>
SVDK_DEVICE float read_one(const Stream<T>& s, int id) {
  return decode<T>(raw(s.row + id));
}

template <typename T>
SVDK_DEVICE float read_one(const Stream<Adjusted<T>>& s, int id) {
  float x = read_one(s.logits, id);
  if (s.bias) x += load_in_turn(s.bias + id);
  return s.allowed_from(id) & 1 ? x : -kFloatInf;
}

// 16 bytes from `shift` bytes into the 32 of two neighbouring loads.
SVDK_DEVICE uint4 join(uint4 a, uint4 b, uint32_t shift) {
  uint32_t x0 = a.x, x1 = a.y, x2 = a.z, x3 = a.w, x4 = b.x, x5 = b.y;
  if (shift & 8) {
    x0 = a.z, x1 = a.w, x2 = b.x, x3 = b.y, x4 = b.z, x5 = b.w;
  }
  if (shift & 4) {
    x0 = x1, x1 = x2, x2 = x3, x3 = x4, x4 = x5;
  }
  const uint32_t bits = (shift & 3) * 8;
  return {funnel_right(x0, x1, bits), funnel_right(x1, x2, bits), funnel_right(x2, x3, bits),
          funnel_right(x3, x4, bits)};
}

// The word with tokens `at` and on, one by one; -inf past the end of the row.
template <typename T>
SVDK_DEVICE uint32_t gather_word(const Stream<T>& s, int at) {
  const uint32_t first = at < s.vocab ? raw(s.row + at) : Traits<T>::kMinusInf;
  if (sizeof(T) == 4) return first;
  return first | (at + 1 < s.vocab ? raw(s.row + at + 1) : Traits<T>::kMinusInf) << 16;
}

// Tokens [at, at + 16 / sizeof(T)).
template <typename T>
SVDK_DEVICE uint4 fetch16(const Stream<T>& s, int at) {
  constexpr int N = 16 / sizeof(T), kWord = 4 / sizeof(T);
  const char* p = reinterpret_cast<const char*>(s.row + at);
  if (at + N <= s.vocab) {
    if (s.shift == 0) return load16(p);
    const char* low = p - s.shift;
    const bool inside = low >= reinterpret_cast<const char*>(s.row) &&
                        low + 32 <= reinterpret_cast<const char*>(s.row + s.vocab);
    if (inside) return join(load16(low), load16(low + 16), s.shift);
  }
  return {gather_word(s, at), gather_word(s, at + kWord), gather_word(s, at + 2 * kWord),
          gather_word(s, at + 3 * kWord)};
}

// N tokens, as loaded and as floats.
template <typename T, int N>
struct Lanes {
  static constexpr int kLoads = N * sizeof(T) / 16, kPer = 16 / sizeof(T);
  uint4 words[kLoads];
  SVDK_DEVICE void fetch(const Stream<T>& s, int at) {
    SVDK_UNROLL
    for (int i = 0; i < kLoads; ++i) words[i] = fetch16(s, at + i * kPer);
  }
  // Likewise, of an aligned row in which all of them exist.
  SVDK_DEVICE void fetch_whole(const Stream<T>& s, int at) {
    SVDK_UNROLL
    for (int i = 0; i < kLoads; ++i) words[i] = load16(s.row + at + i * kPer);
  }
  // A word of logits that are -inf.
  static constexpr uint32_t kNothing = Traits<T>::kMinusInf * (sizeof(T) == 4 ? 1u : 0x10001u);
  SVDK_DEVICE void clear() {
    SVDK_UNROLL
    for (int i = 0; i < kLoads; ++i) words[i] = {kNothing, kNothing, kNothing, kNothing};
  }
  SVDK_DEVICE bool all_masked() const {
    uint32_t differs = 0;
    SVDK_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      differs |= (words[i].x ^ kNothing) | (words[i].y ^ kNothing);
      differs |= (words[i].z ^ kNothing) | (words[i].w ^ kNothing);
    }
    return differs == 0;
  }
  SVDK_DEVICE void unpack(float (&out)[N]) const {
    SVDK_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t word[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
      SVDK_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (sizeof(T) == 4) {
          out[i * kPer + k] = decode<T>(word[k]);
        } else {
          out[i * kPer + 2 * k] = decode<T>(word[k] & 0xffffu);
          out[i * kPer + 2 * k + 1] = decode<T>(word[k] >> 16);
        }
      }
    }
  }
};

// The bias is read when the logits are unpacked: held from the fetch on, it would take registers
// that these kernels do not have.
template <typename T, int N>
struct Lanes<Adjusted<T>, N> {
  Lanes<T, N> logits;
  const float* bias;
  uint32_t allowed;
  int n;
  SVDK_DEVICE void fetch(const Stream<Adjusted<T>>& s, int at) {
    static_assert(32 % N == 0, "the bits of a vector are in one word");
    logits.fetch(s.logits, at);
    rest(s, at);
  }
  SVDK_DEVICE void fetch_whole(const Stream<Adjusted<T>>& s, int at) {
    logits.fetch_whole(s.logits, at);
    rest(s, at);
  }
  SVDK_DEVICE void rest(const Stream<Adjusted<T>>& s, int at) {
    allowed = s.allowed_from(at);
    bias = s.bias ? s.bias + at : nullptr;
    n = s.logits.vocab - at;
  }
  SVDK_DEVICE void clear() {
    logits.clear();
    bias = nullptr;
    allowed = n = 0;
  }
  SVDK_DEVICE bool all_masked() const {
    return (allowed & static_cast<uint32_t>((uint64_t{1} << N) - 1)) == 0 ||
           (!bias && logits.all_masked());
  }
  SVDK_DEVICE void unpack(float (&out)[N]) const {
    logits.unpack(out);
    if (bias) {
      SVDK_UNROLL
      for (int e = 0; e < N; ++e) {
        if (e < n) out[e] += load_in_turn(bias + e);
      }
    }
    SVDK_UNROLL
    for (int e = 0; e < N; ++e) {
      if (!(allowed >> e & 1)) out[e] = -kFloatInf;
    }
  }
};

// The largest value of some vectors, which are `x` as floats; -inf if there is none. Values of 16
// bits are compared two at a time.
template <typename T, int N, int U>
SVDK_DEVICE float top_of(const Lanes<T, N> (&lanes)[U], const float (&)[U][N]) {
  uint32_t top = lanes[0].words[0].x;
  SVDK_UNROLL
  for (int u = 0; u < U; ++u) {
    SVDK_UNROLL
    for (int i = 0; i < Lanes<T, N>::kLoads; ++i) {
      const uint4 words = lanes[u].words[i];
      top = max_word<T>(max_word<T>(top, words.x), max_word<T>(words.y, words.z));
      top = max_word<T>(top, words.w);
    }
  }
  if (sizeof(T) == 4) return fmaxf(decode<T>(top), -kFloatInf);
  return fmaxf(decode<T>(top & 0xffffu), fmaxf(decode<T>(top >> 16), -kFloatInf));
}
template <typename T, int N, int U>
SVDK_DEVICE float top_of(const Lanes<Adjusted<T>, N> (&)[U], const float (&x)[U][N]) {
  float top = -kFloatInf;
  SVDK_UNROLL
  for (int u = 0; u < U; ++u) {
    SVDK_UNROLL
    for (int e = 0; e < N; ++e) top = fmaxf(top, x[u][e]);
  }
  return top;
}

// Vectors in flight; adjusting them takes the registers of the second.
template <typename T>
constexpr int kInFlight = 2;
template <typename T>
constexpr int kInFlight<Adjusted<T>> = 1;

// A row's two operands. N: tokens of a vector; kUnroll: vectors whose loads are in flight together.
template <typename T, int S>
struct Operands {
  using Other = T;
  static constexpr int N = 16 / sizeof(T), kUnroll = kInFlight<T>;
  Stream<T> warm, other;
};
template <typename T>
struct Operands<T, kVectorRow> {
  using Other = float;
  static constexpr int N = 16 / sizeof(T), kUnroll = sizeof(T) == 2 ? 1 : kInFlight<T>;
  Stream<T> warm;
  Stream<float> other;
};

template <typename T>
SVDK_DEVICE bool is_aligned(const Stream<T>& s) {
  return s.shift == 0;
}
template <typename T>
SVDK_DEVICE bool is_aligned(const Stream<Adjusted<T>>& s) {
  return s.logits.shift == 0;
}

template <typename T, int S>
SVDK_DEVICE Operands<T, kNone> warm_only(const Operands<T, S>& row) {
  return {row.warm, {}};
}

// Row `from` of a table, for row `row` of the call.
template <typename T>
SVDK_DEVICE void open_stream(const BatchArgs& a, const Table& table, int64_t from, int,
                             Stream<T>& to) {
  const T* p = static_cast<const T*>(table.data) + from * table.stride;
  to = {p, a.vocab, static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) & 15)};
}
template <typename T>
SVDK_DEVICE void open_stream(const BatchArgs& a, const Table& table, int64_t from, int row,
                             Stream<Adjusted<T>>& to) {
  const Adjustments& x = a.adjustments;
  open_stream(a, table, from, row, to.logits);
  to.bias = x.bias ? x.bias + row * x.bias_stride : nullptr;
  to.bitmask = x.bitmask ? x.bitmask + row * x.bitmask_stride : nullptr;
}

enum Readable : int { kBoth, kWarmOnly, kNothing };

// The operands of a row, as far as their indices are of rows that exist.
template <typename T, int S>
SVDK_DEVICE Readable open_operands(const BatchArgs& a, int row, Operands<T, S>& operands) {
  const int64_t warm = a.warm.index ? a.warm.index[row] : row;
  if (warm < 0 || warm >= a.warm.limit) return kNothing;
  open_stream(a, a.warm, warm, row, operands.warm);
  if (S == kNone) return kBoth;
  const int64_t other = a.other.index ? a.other.index[row] : row;
  if (other < 0 || other >= a.other.limit) return kWarmOnly;
  open_stream(a, a.other, other, row, operands.other);
  return kBoth;
}

// The base logit or the vector's entry of a token; 0 where there is neither.
template <typename T, int S>
SVDK_DEVICE float other_at(const Operands<T, S>& row, int id) {
  if constexpr (S == kNone) {
    return 0.0f;
  } else {
    return read_one(row.other, id);
  }
}

// Both operands of the N tokens from `at` on.
template <typename T, int S, int N>
SVDK_DEVICE void read_vector(const Operands<T, S>& row, int at, float (&w)[N], float (&other)[N]) {
  Lanes<T, N> lanes;
  lanes.fetch(row.warm, at);
  lanes.unpack(w);
  if constexpr (S != kNone) {
    Lanes<typename Operands<T, S>::Other, N> others;
    others.fetch(row.other, at);
    others.unpack(other);
  }
}

// This thread's vectors of an iteration: U of each operand, all loads issued before the first is
// used. Those past the end are -inf. True if there are none such, in any thread.
template <int U, typename T, int S, typename Lane, typename OtherLane>
SVDK_DEVICE bool fetch_vectors(const Operands<T, S>& row, int from, int end, Lane (&w)[U],
                               OtherLane (&other)[U]) {
  constexpr int N = Operands<T, S>::N;
  const bool whole = from + U * kThreads * N <= end;
  const int first = from + thread_id() * N;
  // The same in all threads: no load waits for a branch of its own.
  if (whole && is_aligned(row.warm) && (S == kNone || is_aligned(row.other))) {
    SVDK_UNROLL
    for (int u = 0; u < U; ++u) {
      w[u].fetch_whole(row.warm, first + u * kThreads * N);
      if constexpr (S != kNone) other[u].fetch_whole(row.other, first + u * kThreads * N);
    }
    return true;
  }
  SVDK_UNROLL
  for (int u = 0; u < U; ++u) {
    const int at = first + u * kThreads * N;
    w[u].clear();
    if constexpr (S != kNone) other[u].clear();
    if (at >= end) continue;
    w[u].fetch(row.warm, at);
    if constexpr (S != kNone) other[u].fetch(row.other, at);
  }
  return whole;
}

// The tokens of [begin, end) that are this thread's, vector by vector: f(at, n, w, other) where n
// of the N tokens exist. `begin` is a multiple of N. U vectors are loaded before the first is used;
// one is enough for sweeps that are rare or find the row in L2.
template <int U = 1, typename T, int S, typename F>
SVDK_DEVICE void for_vectors(const Operands<T, S>& row, int begin, int end, const F& f) {
  constexpr int N = Operands<T, S>::N;
  using Other = typename Operands<T, S>::Other;
  SVDK_ROLLED
  for (int from = begin; from < end; from += U * kThreads * N) {
    Lanes<T, N> w[U];
    Lanes<Other, N> o[U];
    const bool whole = fetch_vectors<U>(row, from, end, w, o);
    SVDK_UNROLL
    for (int u = 0; u < U; ++u) {
      const int at = from + (u * kThreads + thread_id()) * N;
      if (!whole && at >= end) continue;
      float x[N], y[N];
      w[u].unpack(x);
      if (S != kNone) o[u].unpack(y);
      f(at, end - at < N ? end - at : N, x, y);
    }
  }
}

}  // namespace svdk::cuda
