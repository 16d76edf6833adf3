// What one row of an operation needs and yields, and the table of sweeps that each instruction set
// fills in. No PyTorch here: the kernels are plain C++ over pointers.
#pragma once
#include <vector>

#include "../common.h"

namespace svdk {

// Tokens a sweep handles at a time: small enough for L1, a multiple of the Philox group.
constexpr int kBlock = 1024;
// Blocks in a slice at least, where a row is shared by threads; tests of short rows lower it.
#ifndef SVDK_SLICE_BLOCKS
#define SVDK_SLICE_BLOCKS 16
#endif
constexpr int kSliceBlocks = SVDK_SLICE_BLOCKS;
// Candidates a row (or slice of one) keeps before the sweep gives up and a second one is made.
constexpr int kCapacity = 4096;

// std::exp and std::log, as the formulas of common.h take them.
struct Math {
  static double exp(double x) { return std::exp(x); }
  static double log(double x) { return std::log(x); }
};

// One row: the warm logits and what they are compared with (base logits, a vector, or nothing).
struct Row {
  const void* warm;
  const void* base;     // same dtype as warm, or null
  const float* vector;  // or null
  DType dtype;
  int vocab, direction;
};

struct Sums : SumsOf<Math, double, double> {
  int64_t n_finite = 0;       // tokens with a finite warm logit
  bool invalid = false;       // NaN or +inf seen
  bool base_masked = false;   // a token with finite warm and -inf base seen
  bool beyond_float = false;  // a finite value seen next to which others would be rounded away

  Sums() { clear(); }
  void merge(Sums other) {
    const double w = std::fmax(max_w, other.max_w), b = std::fmax(max_b, other.max_b);
    rescale(w, b);
    other.rescale(w, b);
    z_w += other.z_w;
    z_b += other.z_b;
    usable += other.usable;
    cross += other.cross;
    n_finite += other.n_finite;
    invalid |= other.invalid;
    base_masked |= other.base_masked;
    beyond_float |= other.beyond_float;
  }
};

struct Constants : ConstantsOf<Math> {
  double pivot = 0;  // of the moments

  Constants() : ConstantsOf<Math>{kPlain, 0, 0, 0, 0, 0, 0, -kInf, 0, -kInf} {}
  explicit Constants(const ConstantsOf<Math>& x) : ConstantsOf<Math>(x) {}
};

// A filter that keeps, whatever rounding says of it, the token with the largest exact steered
// logit.
struct RowFilter : Filter {
  int best = -1;

  RowFilter() : Filter(Filter::none()) {}
  bool keeps(float z, int id) const { return Filter::keeps(z, id) || id == best; }
};

struct Noise {
  uint64_t seed = 0, offset = 0;
  double inverse_temperature = 1;
  bool greedy = false;
  bool needs_sums = false;  // with `sums`: all of them, not only the maximum and the flags
};

struct Partition : PartitionOf<Math, double> {
  Best greedy = Best::none();  // argmax over C

  Partition() { clear(); }
};

// Counts and masses of steered logits by the top bits of their ordered key, for top-k and top-p.
struct Histogram {
  int64_t count[kBins];
  double mass[kBins];
};

struct CandidateBuffer {
  std::vector<Candidate> items;  // at most kCapacity
  bool overflow = false;
};

// The sweeps over tokens [begin, end) of a row; begin is a multiple of kBlock.
struct Sweeps {
  const char* name;
  // First sweep: sums, and with a buffer the candidates within log_alpha of the running maximum.
  void (*sums)(const Row&, int begin, int end, double log_alpha, Sums&, CandidateBuffer*);
  // Best perturbed (or greedy) steered logit. With `sums` it is the first sweep as well; then a row
  // that turns out invalid or base-masked is left early with the flag set.
  void (*sample)(const Row&, int begin, int end, const Constants&, const RowFilter&, const Noise&,
                 Sums*, Best&);
  void (*moments)(const Row&, int begin, int end, const Constants&, MomentSums&);
  void (*partition)(const Row&, int begin, int end, const Constants&, const double* strengths,
                    int count, Partition*);
  // Histogram over the bits of keys from `shift` up (11 of them, 10 at shift 0) of the keys whose
  // higher bits equal prefix; masses exp((z - top) / temperature).
  void (*histogram)(const Row&, int begin, int end, const Constants&, uint32_t floor_key, int shift,
                    uint32_t prefix, double top, double inverse_temperature, Histogram&);
  // Tokens whose key is at least floor_key; at most kCapacity.
  void (*gather)(const Row&, int begin, int end, const Constants&, uint32_t floor_key,
                 std::vector<Candidate>&);
  // Adds to `seen` the tokens whose key equals `key`; the id of the one that makes it `wanted`, or
  // -1.
  int (*nth_tie)(const Row&, int begin, int end, const Constants&, uint32_t key, int64_t wanted,
                 int64_t& seen);
};

const Sweeps* sweeps_portable();
const Sweeps* sweeps_avx2();    // null where the compiler or the machine lacks it
const Sweeps* sweeps_avx512();  // likewise

}  // namespace svdk
