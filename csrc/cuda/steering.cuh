// Arguments, constants and per-row scalars of the CUDA kernels. svdk/ops/reference.py is the
// specification; csrc/cpu is the same algorithm in double.
#pragma once
#include "../philox.h"
#include "platform.cuh"

// The tests build with smaller ones, so that short rows meet every path.
#ifndef SVDK_SLICE_TOKENS
#define SVDK_SLICE_TOKENS 8192
#endif
#ifndef SVDK_LIST
#define SVDK_LIST 1024
#endif

namespace svdk::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMinBlocks = 2;  // resident CTAs that the register budget allows for
constexpr int kMaxSlices = 16;
constexpr int kSliceTokens = SVDK_SLICE_TOKENS;
constexpr int kList = SVDK_LIST;  // tokens that the finish handles without sweeping the row again
constexpr int kBins = 2048;
constexpr double kEps = 1e-12;
constexpr float kLargestGumbel = 22.873857f;  // -log(-log(1 - 2^-33))
constexpr int kMaxId = 0x7fffffff;

// For lambdas: one that is used twice is otherwise called, with its captures on the stack.
#define SVDK_INLINED __attribute__((always_inline))
#define SVDK_INF (__builtin_huge_valf())
#define SVDK_NAN (__builtin_nanf(""))

enum Direction : int { kKlGradient = 0, kLogRatio = 1, kVector = 2, kPlain = 3 };
enum StrengthMode : int { kConstant = 0, kLabel = 1, kKlBudget = 2 };
enum Status : int { kInvalid = 1, kBaseMasked = 2 };
// Beside the status, inside the kernels: warm and base logits so far apart that the rounding of
// their difference shows in the steered logit.
constexpr int kFar = 4;
constexpr float kApart = 256.0f;
// A perturbed score next to which the rounding of the noise shows.
constexpr float kLoud = 8192.0f;
// The second operand of a kernel, a template parameter.
enum Source : int { kNone = 0, kBase = 1, kVectorRow = 2 };
// How the CTAs of a row exchange what they found.
enum Transport : int { kSolo = 0, kCluster = 1, kWorkspace = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// A per-row parameter: one value a row, or one for all.
template <typename T, typename R>
struct Value {
  T scalar;
  const R* rows;
  SVDK_DEVICE T at(int row) const { return rows ? static_cast<T>(rows[row]) : scalar; }
};
using Real = Value<double, float>;
using Integer = Value<int64_t, int64_t>;

// A logits tensor (or a table of vectors): rows picked by index, or in order.
struct Table {
  const void* data;
  int64_t stride;  // elements
  const int64_t* index;
  int64_t limit;
};

struct Candidate {
  int32_t id;
  float warm, other;  // other: base logit or vector entry
};

// What one warp adds up over one slice: the first sweep in float, the rarer ones in double.
union WarpSums {
  float v[6];
  double d[4];
};

// What a CTA publishes about its slices of a row.
struct alignas(128) Part {
  WarpSums sums[kMaxSlices][kWarps];
  unsigned long long best;  // best_key
  uint32_t count;           // candidates offered; beyond kList they are lost
  int32_t dead;             // tokens whose warm logit is -inf
  int32_t flags;            // Status, kFar
  Candidate list[kList];
};

struct RowArgs {
  Table warm, other;
  int batch, vocab, direction, split, transport;
  double penalty;
  Real alpha;
  double log_alpha;   // of alpha.scalar
  Part* parts;        // kWorkspace: (batch, split)
  uint32_t* tickets;  // kWorkspace: (batch,), all zero between launches
};

struct SampleArgs {
  RowArgs rows;
  int mode;
  Real strength, temperature, top_p, min_p;
  Integer top_k, seed, offset;
  const int64_t* labels;
  int64_t* token;  // (B,)
  float* floats;   // (5, B) or null
  int32_t* ints;   // (2, B) or null
};

struct ScoreArgs {
  RowArgs rows;
  const int64_t* labels;
  Real strength;
  const float* strengths;  // (M,) or null: one value a row
  int count;               // M
  float* curves;           // (3, B, M)
  int64_t* greedy;         // (B, M)
  float* stats;            // (6, B)
  int32_t* status;         // (B,)
};

// What extract's second kernel needs of a row.
struct Extracted {
  double log_w, log_b, kl;
  float max_w, max_b, inside_from;
  int32_t count;
};

struct ExtractArgs {
  RowArgs rows;
  Extracted* extracted;  // (B,)
  float* stats;          // (3, B)
  int32_t* status;       // (B,)
  int64_t* row_ptr;      // (B + 1,)
  int64_t* ids;          // (N,), second kernel
  float *p, *delta;      // (N,), second kernel
};

// A row's constants once the first sweep is over.
struct Context {
  int direction, finite, inside;  // tokens with a finite warm logit; size of C
  float max_w, max_b;
  float inside_from;  // C: warm >= inside_from (only set where a sweep needs it)
  // log_w, log_b: of sum exp(x - max). A log-sum-exp in one number would round them away next to a
  // maximum of 1e16 and more.
  double log_alpha, log_w, log_b, kl, mu, penalty;
};

// A row's parameters of steered_sample.
struct SampleRow {
  int mode, valid;
  double strength, temperature, top_p, min_p, log_alpha;
  int64_t top_k, label;
  uint64_t seed, offset;
  SVDK_DEVICE bool filtered() const {
    return temperature > 0 && (top_k > 0 || top_p < 1 || min_p > 0);
  }
};

// How a row is cut: always the same way, so that sums do not depend on how many CTAs share them.
struct Slices {
  int count, length;
  SVDK_DEVICE explicit Slices(int vocab) {
    count = (vocab + kSliceTokens - 1) / kSliceTokens;
    if (count > kMaxSlices) count = kMaxSlices;
    length = ((vocab + count - 1) / count + 63) / 64 * 64;
    count = (vocab + length - 1) / length;
  }
};

SVDK_DEVICE bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }
SVDK_DEVICE bool is_finite(double x) { return fabs(x) <= DBL_MAX; }

constexpr float kLog2e = 1.44269504088896341f;
SVDK_DEVICE float fast_exp(float x) { return exp2_approx(x * kLog2e); }

// Order-preserving map from float to unsigned; both zeros are one value.
SVDK_DEVICE uint32_t ordered_key(float x) {
  const uint32_t bits = bits_of(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
SVDK_DEVICE float key_value(uint32_t key) {
  return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Best of (score, id): the larger score, then the lower id. 0 is nobody.
SVDK_DEVICE unsigned long long best_key(float score, int id) {
  return static_cast<unsigned long long>(ordered_key(score)) << 32 | (0xffffffffu - id);
}
SVDK_DEVICE int best_id(unsigned long long key) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}
SVDK_DEVICE float best_score(unsigned long long key) {
  return key ? key_value(static_cast<uint32_t>(key >> 32)) : -SVDK_INF;
}

// One token's random word. As token_bits, without an index into registers.
SVDK_DEVICE uint32_t word_of(uint64_t seed, uint64_t offset, int token) {
  const PhiloxBlock block = philox(seed, offset, static_cast<uint32_t>(token) >> 2);
  const uint32_t low = token & 1 ? block.word[1] : block.word[0];
  const uint32_t high = token & 1 ? block.word[3] : block.word[2];
  return token & 2 ? high : low;
}

// -log(-log(u)), u = (bits + 0.5) / 2^32, without ever rounding u to 1.
SVDK_DEVICE float gumbel(uint32_t bits) {
  const bool upper = bits >= 0x80000000u;
  const float v = (static_cast<float>(upper ? ~bits : bits) + 0.5f) * 0x1p-32f;
  return -logf(upper ? -log1pf(-v) : -logf(v));
}

SVDK_DEVICE double log_p_of(const Context& c, float w) {
  return (static_cast<double>(w) - c.max_w) - c.log_w;
}
SVDK_DEVICE double log_q_of(const Context& c, float b) {
  return b == -SVDK_INF ? -static_cast<double>(SVDK_INF)
                        : (static_cast<double>(b) - c.max_b) - c.log_b;
}

// The steering direction at one token, in double but for the exponential.
SVDK_DEVICE double delta_of(const Context& c, float w, float other) {
  if (c.direction == kPlain) return 0;
  if (c.direction == kVector) return other;
  if (other == -SVDK_INF || w == -SVDK_INF) return 0;
  const double x = log_p_of(c, w), d = x - log_q_of(c, other) - c.kl;
  return c.direction == kLogRatio ? d : fast_exp(static_cast<float>(x)) * d;
}
SVDK_DEVICE bool is_inside(const Context& c, float w) {
  return w != -SVDK_INF && static_cast<double>(w) - c.max_w >= c.log_alpha;
}
SVDK_DEVICE double steered_of(const Context& c, double mu, float w, float other) {
  if (w == -SVDK_INF) return -static_cast<double>(SVDK_INF);
  if (is_inside(c, w)) return w + mu * delta_of(c, w, other);
  return c.penalty < -DBL_MAX ? c.penalty : w + mu * c.penalty;
}

// The smallest float inside C: a search over keys, because the test is made in double.
SVDK_DEVICE float inside_from(float max_w, double log_alpha) {
  if (log_alpha < -DBL_MAX) return -FLT_MAX;
  uint32_t low = ordered_key(-FLT_MAX), high = ordered_key(max_w);  // high is inside
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (static_cast<double>(key_value(middle)) - max_w >= log_alpha) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return key_value(high);
}

SVDK_DEVICE double clamped(double x, double limit) { return fmin(fmax(x, -limit), limit); }

// The same arithmetic in float, for sweeps over the whole row. Logits may be as large as a float,
// and mu too, so everything is scaled by powers of two, which costs no precision, until nothing can
// leave the range of a float: logits by kShrink, steered logits (less max_w) by `scale`. Order and
// ties are those of the steered logits themselves.
struct FastContext {
  static constexpr float kShrink = 0x1p-4f;

  float mu, from, outside, max_w, max_b, gap, log_w, scale;
  int direction;
  SVDK_DEVICE explicit FastContext(const Context& c)
      : from(c.inside_from),
        max_w(kShrink * c.max_w),
        max_b(kShrink * c.max_b),
        gap(static_cast<float>(kShrink * (c.log_w - c.log_b + c.kl))),
        log_w(static_cast<float>(c.log_w) * kLog2e),
        direction(c.direction) {
    // Beyond 2^117 the size of mu no longer matters: all that counts is who has the larger delta.
    const double size = clamped(c.mu, 0x1p117);
    scale = scalbnf(1.0f, -9 - ilogb(fmax(fabs(size), 1.0)));
    mu = static_cast<float>(size * scale) * (c.direction == kVector ? 1.0f : 1.0f / kShrink);
    const double shift = c.mu * c.penalty;  // 0 * -inf is NaN
    outside =
        c.penalty < -DBL_MAX ? -SVDK_INF : static_cast<float>(clamped(scale * shift, 0x1p126));
  }

  // The unit of delta() in steered logits.
  template <int S>
  SVDK_DEVICE static constexpr double unit() {
    return S == kVectorRow ? 1.0 : 1.0 / kShrink;
  }
  SVDK_DEVICE float shrunk(float w) const { return fmaf(w, kShrink, -max_w); }
  // p at a shrunk warm logit.
  SVDK_DEVICE float p(float dw) const { return exp2_approx(fmaf(dw, kLog2e / kShrink, -log_w)); }

  template <int S>
  SVDK_DEVICE float delta(float w, float other) const {
    if (S == kNone) return 0.0f;
    if (S == kVectorRow) return other;
    if (other == -SVDK_INF) return 0.0f;
    const float dw = shrunk(w), d = dw - fmaf(other, kShrink, -max_b) - gap;
    return direction == kLogRatio ? d : p(dw) * d;
  }
  // What moves with mu at a token, and the steered logit that this makes.
  template <int S>
  SVDK_DEVICE float steered_by(float w, float move) const {
    if (S == kNone) return shrunk(w);
    return fmaf(shrunk(w), scale / kShrink, w < from ? outside : mu * move);
  }
  template <int S>
  SVDK_DEVICE float steered(float w, float other) const {
    if (S == kNone) return shrunk(w);
    return steered_by<S>(w, w < from ? 0.0f : delta<S>(w, other));
  }
  // What steered logits are to be multiplied by to be in nats again.
  template <int S>
  SVDK_DEVICE float nats() const {
    return 1.0f / (S == kNone ? kShrink : scale);
  }
};

// Which tokens a sample of the whole row may draw: those above `floor`, and of those equal to it
// the ones with an id up to `last_tie`.
struct Filter {
  float floor;
  int last_tie;
  SVDK_DEVICE bool keeps(float z, int id) const {
    return z > floor || (z == floor && id <= last_tie);
  }
};

// Perturbed scores, unit * (z / temperature + noise) with z = nats * steered: `rate` times the
// steered logit plus `unit` times the noise. `unit` is a power of two, 1 or so little that a score
// at a low temperature does not leave the range of a float.
struct Noise {
  float rate, unit;
  bool greedy;

  SVDK_DEVICE void set(const SampleRow& p, float nats) {
    greedy = p.temperature == 0;
    const double per_nat = nats / (greedy ? 1.0 : p.temperature);
    const int exponent = -3 - ilogb(per_nat), power = exponent < 0 ? exponent : 0;
    rate = static_cast<float>(scalbn(per_nat, power));
    unit = scalbnf(1.0f, power);
  }
  // 1 / unit, 2^127 at the most.
  SVDK_DEVICE float per_unit() const { return float_of(0x7f000000u - bits_of(unit)); }
};

}  // namespace svdk::cuda
