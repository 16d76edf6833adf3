// Reductions, scans and arg-bests over a warp, a block and the CTAs of a row: one of each, by
// operator. Their results do not depend on the schedule.
#pragma once
#include "../common.h"
#include "platform.cuh"

namespace svdk::cuda {

// The operators.
struct Sum {
  template <typename T>
  SVDK_DEVICE T operator()(const T& a, const T& b) const {
    return a + b;
  }
};
struct Max {
  SVDK_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
  SVDK_DEVICE double operator()(double a, double b) const { return fmax(a, b); }
};

// A float score and its token in one word, so that the larger word is the better one: the larger
// score, then the lower id. 0 is nobody.
using BestKey = unsigned long long;
SVDK_DEVICE BestKey best_key(float score, int id) {
  return static_cast<BestKey>(ordered_key(score)) << 32 | (0xffffffffu - id);
}
SVDK_DEVICE int best_id(BestKey key) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}
SVDK_DEVICE float best_score(BestKey key) {
  return key ? key_value(static_cast<uint32_t>(key >> 32)) : -kFloatInf;
}

// Arg-best, of float scores (as keys) or double ones.
struct Better {
  SVDK_DEVICE BestKey operator()(BestKey a, BestKey b) const { return b > a ? b : a; }
  SVDK_DEVICE Best operator()(Best a, Best b) const {
    if (b.id >= 0) a.offer(b.score, b.id);
    return a;
  }
};

// What another lane has. Types of several words bring their own overloads.
template <typename T>
SVDK_DEVICE T from_lane_xor(T x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}
template <typename T>
SVDK_DEVICE T from_lane(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <typename T>
SVDK_DEVICE T from_lane_below(T x, int distance) {
  return __shfl_up_sync(0xffffffffu, x, distance);
}
SVDK_DEVICE Best from_lane_xor(Best x, int distance) {
  return {from_lane_xor(x.score, distance), from_lane_xor(x.id, distance)};
}

// Over the warp, the same in every lane.
template <typename T, typename Op>
SVDK_DEVICE T warp_reduce(T x, Op op) {
  for (int distance = 16; distance; distance >>= 1) x = op(x, from_lane_xor(x, distance));
  return x;
}
SVDK_DEVICE float warp_reduce(float x, Max) { return key_value(warp_max(ordered_key(x))); }

// Over f(0) to f(count - 1) and `first`, which warps do each for itself: the same in every lane.
template <typename T, typename F, typename Op>
SVDK_DEVICE T reduce_over(int count, T first, const F& f, Op op) {
  SVDK_ROLLED
  for (int i = lane_id(); i < count; i += 32) first = op(first, f(i));
  return warp_reduce(first, op);
}

// What the warps of a block leave for each other: values of up to kBytes.
template <int kBytes>
struct SlotsOf {
  alignas(kBytes) unsigned char bytes[kWarps * kBytes];
  template <typename T>
  SVDK_DEVICE T* of() {
    static_assert(sizeof(T) <= kBytes, "too large for its slot");
    return reinterpret_cast<T*>(bytes);
  }
};
using Slots = SlotsOf<16>;

// Over the block, the same in every thread.
template <typename T, typename Op>
SVDK_DEVICE T block_reduce(Slots& slots, T x, Op op) {
  T* const slot = slots.of<T>();
  x = warp_reduce(x, op);
  if (lane_id() == 0) slot[warp_id()] = x;
  __syncthreads();
  T all = slot[0];
  for (int i = 1; i < kWarps; ++i) all = op(all, slot[i]);
  __syncthreads();
  return all;
}

// Sums over the threads up to this one, itself included; `all` is the sum over the block.
template <typename T, int kBytes>
SVDK_DEVICE T block_scan(SlotsOf<kBytes>& slots, T x, T& all) {
  T* const slot = slots.template of<T>();
  for (int distance = 1; distance < 32; distance <<= 1) {
    const T below = from_lane_below(x, distance);
    if (lane_id() >= distance) x = x + below;
  }
  if (lane_id() == 31) slot[warp_id()] = x;
  __syncthreads();
  all = T{};
  T before{};
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp_id()) before = all;
    all = all + slot[i];
  }
  __syncthreads();
  return before + x;
}

}  // namespace svdk::cuda
