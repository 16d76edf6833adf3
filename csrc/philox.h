// Philox4x32-10 (Salmon et al., SC 2011), scalar, usable on host and device, and the one uniform of
// a row: key = the row's seed, counter = (0, offset low, offset high, stream).
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SVDK_HD __host__ __device__ __forceinline__
#else
#define SVDK_HD inline
#endif

namespace svdk {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kSampleStream = 0;

struct PhiloxBlock {
  uint32_t word[4];
};

SVDK_HD PhiloxBlock philox(uint64_t seed, uint64_t offset, uint32_t stream = kSampleStream) {
  uint32_t c0 = 0, c1 = static_cast<uint32_t>(offset);
  uint32_t c2 = static_cast<uint32_t>(offset >> 32), c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t b = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// A row's uniform in (0, 1]: (x + 0.5) 2^-53, x the upper 53 bits of words 0 (high) and 1.
SVDK_HD double row_uniform(uint64_t seed, uint64_t offset) {
  const PhiloxBlock block = philox(seed, offset);
  const uint64_t bits = static_cast<uint64_t>(block.word[0]) << 32 | block.word[1];
  return (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
}

}  // namespace svdk
