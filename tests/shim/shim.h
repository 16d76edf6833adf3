// The CUDA kernels on the CPU: every CUDA thread is a fiber, every barrier and warp operation a
// place where fibers wait for each other. The scheduler picks the next fiber in order or at random,
// so that code which relies on an order it did not ask for (a missing barrier) gives wrong results.
// This header stands in for the CUDA half of csrc/cuda/platform.cuh and for CUDA's own built-ins.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define SVDK_DEVICE inline
#define SVDK_UNROLL
#define SVDK_UNROLL4
#define SVDK_ROLLED
#define SVDK_SHARED(type, name) type& name = *static_cast<type*>(shim::shared_memory(sizeof(type)))

namespace shim {

struct Index {
  uint32_t x;
};
Index thread_index();
Index block_index();
void* shared_memory(size_t bytes);        // of the running fiber's block
void* peer_memory(void* mine, int rank);  // the same variable of another block of the cluster
void block_barrier(int line);
void cluster_barrier(int line);
void maybe_yield();  // a point where the random schedule may switch
// Every lane of the warp gives `mine`; all[i] is what lane i gave.
void exchange(uint64_t mine, uint64_t (&all)[32], int line);

template <typename T>
uint64_t pack(T x) {
  static_assert(sizeof(T) <= 8, "one word a lane");
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  return word;
}
template <typename T>
T unpack(uint64_t word) {
  T x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}
template <typename T>
T from_lane(T mine, int lane, int line) {
  uint64_t all[32];
  exchange(pack(mine), all, line);
  return unpack<T>(all[lane & 31]);
}
inline int lane() { return static_cast<int>(thread_index().x & 31); }
// The lane itself where there is none that far below, as on the device.
inline int lane_above(int o) { return lane() >= o ? lane() - o : lane(); }
template <typename T>
T fetch_add(T* p, T x) {
  maybe_yield();
  const T old = *p;
  *p = old + x;
  return old;
}

}  // namespace shim

#define threadIdx (shim::thread_index())
#define blockIdx (shim::block_index())
#define __syncthreads() shim::block_barrier(__LINE__)
#define __threadfence() shim::maybe_yield()
#define __shfl_xor_sync(mask, value, o) shim::from_lane(value, shim::lane() ^ (o), __LINE__)
#define __shfl_sync(mask, value, lane) shim::from_lane(value, lane, __LINE__)
#define __shfl_up_sync(mask, value, o) shim::from_lane(value, shim::lane_above(o), __LINE__)

struct uint4 {
  uint32_t x, y, z, w;
};

inline uint32_t atomicAdd(uint32_t* p, uint32_t x) { return shim::fetch_add(p, x); }
inline int atomicAdd(int* p, int x) { return shim::fetch_add(p, x); }
inline int atomicOr(int* p, int x) {
  shim::maybe_yield();
  const int old = *p;
  *p = old | x;
  return old;
}
inline uint32_t atomicMax(uint32_t* p, uint32_t x) {
  shim::maybe_yield();
  const uint32_t old = *p;
  *p = std::max(old, x);
  return old;
}

namespace svdk::cuda {

using std::ceil;
using std::fabs;
using std::ilogb;
using std::log;
using std::scalbn;
using std::sqrt;

// Reads outside of what the caller announced (and loads that are not aligned) stop the run.
uint4 load16(const void* p);
float load_in_turn(const float* p);

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float half_to_float(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, exponent = (x >> 10) & 31, fraction = x & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
  return shim::unpack<float>(bits);
}
inline float bfloat16_to_float(uint16_t x) {
  return shim::unpack<float>(static_cast<uint64_t>(x) << 16);
}
template <typename F>
uint32_t max_of_halves(uint32_t a, uint32_t b, const F& value) {
  uint32_t y = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t p = static_cast<uint16_t>(a >> shift), q = static_cast<uint16_t>(b >> shift);
    const bool first = value(q) != value(q) || value(p) >= value(q);
    y |= static_cast<uint32_t>(first ? p : q) << shift;
  }
  return y;
}
inline uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  return max_of_halves(a, b, bfloat16_to_float);
}
inline uint32_t max_halfx2(uint32_t a, uint32_t b) { return max_of_halves(a, b, half_to_float); }
inline uint32_t warp_max_at(uint32_t x, int line) {
  uint64_t all[32];
  shim::exchange(x, all, line);
  return static_cast<uint32_t>(*std::max_element(all, all + 32));
}
#define warp_max(x) warp_max_at(x, __LINE__)
inline int warp_first_at(bool yes, int line) {
  uint64_t all[32];
  shim::exchange(yes, all, line);
  return static_cast<int>(std::find(all, all + 32, 1u) - all);
}
#define warp_first(yes) warp_first_at(yes, __LINE__)
inline uint32_t read_shared(const uint32_t* p) {
  shim::maybe_yield();
  return *p;
}
inline float float_of(uint32_t bits) { return shim::unpack<float>(bits); }
inline uint32_t bits_of(float x) { return static_cast<uint32_t>(shim::pack(x)); }
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}
inline void cluster_barrier() { shim::cluster_barrier(__LINE__); }
template <typename T>
T* remote(T* shared, int rank) {
  return static_cast<T*>(shim::peer_memory(shared, rank));
}

}  // namespace svdk::cuda
