// A problem for the CPU kernels, decoded from any bytes: operation, shapes, parameters and logits,
// the awkward ones among them on purpose. Every byte string is a valid problem.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/ops.h"

namespace fuzz {

constexpr float kFloatInf = std::numeric_limits<float>::infinity();
constexpr float kFloatMax = std::numeric_limits<float>::max();
constexpr float kFloatNaN = std::numeric_limits<float>::quiet_NaN();

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  uint16_t word() {
    const uint16_t low = byte();
    return static_cast<uint16_t>(low | byte() << 8);
  }
  uint64_t eight() {
    uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x |= static_cast<uint64_t>(byte()) << 8 * i;
    return x;
  }
  float any_float() {
    const uint32_t bits = static_cast<uint32_t>(word()) | static_cast<uint32_t>(word()) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  // One of a table; rarely NaN, -1, infinity or any float.
  template <size_t N>
  double one_of(const double (&table)[N]) {
    const uint8_t b = byte();
    const double rare[] = {svdk::kNaN, -1, svdk::kInf};
    return b == 255 ? any_float() : b > 251 ? rare[b - 252] : table[b % N];
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16 | (std::isnan(x) ? 1 : 0));
}

// Truncated to half: sign, exponent, ten bits; subnormals and overflow included.
inline uint16_t to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e01;
  const float size = std::fabs(x);
  if (size >= 65536.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<int>(size * 0x1p24f));
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 |
                               (static_cast<int>(fraction * 2048.0f) & 1023));
}

inline double value_of(uint16_t x, svdk::DType dtype) {
  if (dtype == svdk::DType::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const double sign = x & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? svdk::kNaN : sign * svdk::kInf;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

// Logits of all rows, in memory of exactly their size, so that a sanitizer sees one byte too far.
struct Operand {
  std::vector<double> values;  // what the kernel will read, exactly
  std::unique_ptr<char[]> memory;
  int64_t row_bytes = 0;

  svdk::Table table() const { return {memory.get(), row_bytes, nullptr}; }

  void store(const std::vector<float>& x, svdk::DType dtype, int vocab) {
    const size_t bytes = dtype == svdk::DType::kFloat ? 4 : 2;
    memory.reset(new char[x.size() * bytes]);
    row_bytes = static_cast<int64_t>(vocab * bytes);
    values.resize(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      if (dtype == svdk::DType::kFloat) {
        std::memcpy(&memory[i * 4], &x[i], 4);
        values[i] = x[i];
      } else {
        const uint16_t y = dtype == svdk::DType::kBFloat16 ? to_bfloat16(x[i]) : to_half(x[i]);
        std::memcpy(&memory[i * 2], &y, 2);
        values[i] = value_of(y, dtype);
      }
    }
  }
};

enum Operation { kSample, kLogprob, kExtract, kOperations };

struct Problem {
  int operation, uses, vocab, batch;  // uses: 0 base, 1 vector, 2 neither
  int direction;
  svdk::DType dtype;
  bool info;
  Operand warm, other;
  std::vector<svdk::Parameters> parameters;  // a row
  std::vector<double> strengths;             // of steered_logprob

  svdk::BatchLogits rows() const {
    svdk::BatchLogits rows{};
    rows.warm = warm.table();
    if (uses == 0) rows.base = other.table();
    if (uses == 1) rows.vector = other.table();
    rows.dtype = dtype;
    rows.vocab = vocab;
    rows.direction = direction;
    rows.batch = batch;
    return rows;
  }
};

inline std::vector<float> pattern(Bytes& in, int count, int vocab) {
  std::mt19937 random(in.byte());
  std::normal_distribution<float> normal;
  const uint8_t kind = in.byte() % 10;
  const float scales[] = {3, 1, 0.01f, 30, 1000, 1e-30f, 1e10f, 1e30f};
  const float scale = scales[in.byte() % 8];
  std::vector<float> x(count);
  for (int i = 0; i < count; ++i) {
    const int t = i % vocab;
    const float noise = normal(random);
    switch (kind) {
      case 0:
      case 1:
      case 2:
        x[i] = noise * scale;
        break;
      case 3:  // all equal
        x[i] = scale;
        break;
      case 4:  // one-hot
        x[i] = t == vocab / 2 ? scale : 0.0f;
        break;
      case 5:  // a rising maximum
        x[i] = scale * static_cast<float>(t) / static_cast<float>(vocab);
        break;
      case 6:
        x[i] = -scale * static_cast<float>(t) / static_cast<float>(vocab);
        break;
      case 7:  // two levels, many ties
        x[i] = noise > 0 ? scale : -scale;
        break;
      case 8:  // nearly everything masked
        x[i] = noise > 2 ? noise * scale : -kFloatInf;
        break;
      default:  // a few values only
        x[i] = std::floor(noise) * scale;
    }
  }
  return x;
}

inline void patch(Bytes& in, std::vector<float>& x) {
  const float values[] = {-kFloatInf, kFloatNaN, kFloatInf, 1e30f, -1e30f, kFloatMax,
                          -kFloatMax, 2e19f,     -2e19f,    1e19f, 1e-45f, -0.0f,
                          88.0f,      200.0f,    -200.0f,   20.0f};
  for (int n = in.byte() % 6; n > 0; --n) {
    const size_t at = in.word() % x.size();
    const uint8_t which = in.byte();
    const float value = which == 255 ? in.any_float() : values[which % 16];
    const size_t run = in.byte() % 4 == 3 ? in.word() : 1;
    for (size_t i = at; i < x.size() && i < at + run; ++i) x[i] = value;
  }
}

inline svdk::Parameters row_parameters(Bytes& in, const Problem& p) {
  svdk::Parameters q{};
  q.strength = in.one_of({1, 0, -1, 0.5, 5, 1e30, -1e30, 1e-30, 3e38, 100, -20, 2});
  q.alpha = in.one_of({0.1, 0, 1e-8, 1, 0.5, 1e-40, 0.1, 0, 0.01, 0.9, 1e-3});
  q.temperature = in.one_of({1, 0, 1e-8, 1e8, 0.7, 1.3, 1, 1, 1e-30, 1e30});
  q.top_p = in.one_of({1, 1, 0.9, 0, 0.5, 1e-8, 0.999999, 0.99, 1});
  q.min_p = in.one_of({0, 0, 0.05, 1, 0.5, 1e-8, 0});
  const int64_t ks[] = {
      0, 0, 1, 2, 5, p.vocab, p.vocab + 1, 1000, std::numeric_limits<int64_t>::max(), 40};
  const uint8_t k = in.byte();
  q.top_k = k == 255 ? in.word() : k == 254 ? -1 : ks[k % 10];
  q.label = static_cast<int64_t>(in.word()) % (p.vocab + 2) - (in.byte() == 255);
  q.seed = in.byte() % 2 ? in.eight() : in.byte();
  q.offset = in.byte() % 2 ? in.eight() : in.byte();
  return q;
}

inline Problem decode(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  Problem p{};
  p.operation = in.byte() % kOperations;
  p.uses = in.byte() % 3;
  p.info = in.byte() % 2;
  p.dtype = static_cast<svdk::DType>(in.byte() % 3);
  p.batch = 1 + in.byte() % 3;
  const int sizes[] = {1,   2,    3,    15,   16,   17,   31,   64,   255,  256,
                       257, 1023, 1024, 1025, 1280, 2048, 2049, 4096, 4097, 9000};
  const uint8_t kind = in.byte();
  p.vocab = kind < 128 ? 1 + in.byte() : kind < 200 ? sizes[in.byte() % 20] : 1 + in.word() % 6000;
  if (p.operation == kExtract && p.uses == 2) p.uses = 0;
  p.direction = p.uses == 0   ? (in.byte() % 2 ? svdk::kLogRatio : svdk::kKlGradient)
                : p.uses == 1 ? svdk::kVector
                              : svdk::kPlain;
  const double penalties[] = {-svdk::kInf, -svdk::kInf, 0, -1.5, 1.5, 1e30, -1e30, 1e-30};
  const double penalty = p.operation == kExtract ? -svdk::kInf : in.one_of(penalties);
  const int mode = p.operation == kSample && p.uses != 2 ? in.byte() % 3 : svdk::kConstant;

  const int count = p.batch * p.vocab;
  std::vector<float> warm = pattern(in, count, p.vocab);
  patch(in, warm);
  p.warm.store(warm, p.dtype, p.vocab);
  if (p.uses != 2) {
    const uint8_t relation = in.byte() % 3;
    std::vector<float> other = pattern(in, count, p.vocab);
    for (int i = 0; relation && i < count; ++i)
      other[i] = relation == 1 ? warm[i] + other[i] : warm[i];
    patch(in, other);
    p.other.store(other, p.uses == 1 ? svdk::DType::kFloat : p.dtype, p.vocab);
  }
  for (int i = 0; i < p.batch; ++i) {
    svdk::Parameters q = row_parameters(in, p);
    q.mode = mode;
    // What the Python side refuses and no device tensor can carry.
    q.penalty = std::isnan(penalty) || penalty == svdk::kInf ? 0 : penalty;
    if (p.operation != kSample) {
      q.temperature = q.top_p = 1;
      q.min_p = q.top_k = 0;
      q.strength = 0;
    }
    p.parameters.push_back(q);
  }
  const int grid = p.operation == kLogprob ? in.byte() % 5 : 0;
  for (int m = 0; m < grid; ++m) {
    p.strengths.push_back(in.one_of({1, 0, -1, 0.5, 5, 1e30, -1e30, 1e-30, -20, 100, 3e38}));
  }
  return p;
}

// What a failed check prints.
inline void print(const Problem& p) {
  const char* operations[] = {"sample", "logprob", "extract"};
  const char* uses[] = {"base", "vector", "nothing"};
  const char* types[] = {"float32", "bfloat16", "float16"};
  std::fprintf(stderr, "%s with %s, %s, B=%d V=%d direction=%d info=%d\n", operations[p.operation],
               uses[p.uses], types[static_cast<int>(p.dtype)], p.batch, p.vocab, p.direction,
               p.info);
  for (double mu : p.strengths) std::fprintf(stderr, "  mu=%.9g\n", mu);
  for (int i = 0; i < p.batch; ++i) {
    const svdk::Parameters& q = p.parameters[i];
    std::fprintf(stderr, "row %d: mode=%d strength=%.9g alpha=%.9g penalty=%.9g temperature=%.9g ",
                 i, q.mode, q.strength, q.alpha, q.penalty, q.temperature);
    std::fprintf(stderr, "top_p=%.9g min_p=%.9g top_k=%lld label=%lld seed=%llu offset=%llu\n",
                 q.top_p, q.min_p, static_cast<long long>(q.top_k), static_cast<long long>(q.label),
                 static_cast<unsigned long long>(q.seed),
                 static_cast<unsigned long long>(q.offset));
    for (const Operand* x : {&p.warm, &p.other}) {
      if (x->values.empty()) continue;
      for (int t = 0; t < std::min(p.vocab, 12); ++t)
        std::fprintf(stderr, " %.9g", x->values[static_cast<size_t>(i) * p.vocab + t]);
      std::fprintf(stderr, "\n");
    }
  }
}

}  // namespace fuzz
