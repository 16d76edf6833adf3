// Step 11: the Gumbel noise of a token, and what scores are made of in float.
#pragma once
#include "../common.h"
#include "platform.cuh"

namespace svdk::cuda {

// A perturbed score next to which the rounding of the noise shows.
constexpr float kRoundsNoise = 8192.0f;

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

// Perturbed scores, unit * (z / temperature + noise) with z = nats * steered: `rate` times the
// steered logit plus `unit` times the noise. `unit` is a power of two, 1 or so little that a score
// at a low temperature does not leave the range of a float.
struct Noise {
  float rate, unit;
  bool greedy;

  SVDK_DEVICE void set(const Parameters& p, float nats) {
    greedy = p.greedy();
    const double per_nat = nats / (greedy ? 1.0 : p.temperature);
    const int exponent = -3 - ilogb(per_nat), power = exponent < 0 ? exponent : 0;
    rate = static_cast<float>(scalbn(per_nat, power));
    unit = scalbnf(1.0f, power);
  }
  // 1 / unit, 2^127 at the most.
  SVDK_DEVICE float per_unit() const { return float_of(0x7f000000u - bits_of(unit)); }
  // Whether the rounding of the noise shows in the best score.
  SVDK_DEVICE bool rounds_noise(float score) const {
    return !greedy && fabsf(score) * per_unit() > kRoundsNoise;
  }
};

}  // namespace svdk::cuda
