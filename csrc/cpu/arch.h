// The table of sweeps that each instruction set fills in, and what the sweeps take and yield.
#pragma once
#include <algorithm>
#include <vector>

#include "steering.h"

namespace svdk {

// Tokens a sweep handles at a time: small enough for L1.
constexpr int kBlock = 1024;
// Blocks in a slice at least; tests of short rows lower it.
#ifndef SVDK_SLICE_BLOCKS
#define SVDK_SLICE_BLOCKS 16
#endif
constexpr int kSliceBlocks = SVDK_SLICE_BLOCKS;
// Tokens of which a sweep that filters follow notes the largest; divides kBlock.
constexpr int kStripe = 128;
// Candidates a slice keeps before the sweep gives up and a second one is made; tests lower it.
#ifndef SVDK_CAPACITY
#define SVDK_CAPACITY 4096
#endif
constexpr int kCapacity = SVDK_CAPACITY;

// Tokens [begin, end) of a row; begin is a multiple of kBlock.
struct Slice {
  const RowLogits& row;
  int begin, end;
};
inline Slice whole(const RowLogits& row) { return {row, 0, row.vocab}; }

struct Candidates {
  std::vector<Candidate> tokens;  // at most kCapacity
  bool overflow = false;
};

// How a row is drawn from.
struct Draw {
  double inverse_temperature = 1;
  bool greedy = true;

  static Draw of(const Parameters& p) {
    return {p.greedy() ? 1.0 : 1.0 / p.temperature, p.greedy()};
  }
  float rate() const { return static_cast<float>(std::fmin(inverse_temperature, FLT_MAX)); }
};

// Of tokens that may be drawn: sum exp((z - max) / temperature) of their steered logits.
struct MassSum {
  double max, sum;
};

// In nats, of what no uniform of 53 bits lands in beside the largest.
constexpr double kNoMass = -64;

// Where a share of the mass of a sequence ends: at which place, and after which share of its mass.
struct Landing {
  int place;
  double share;
};

// The first place whose mass, with that of the places before it, exceeds `share` of all; the last
// one with mass where rounding leaves none.
inline Landing land(const double* masses, int count, double share) {
  double all = 0, before = 0;
  for (int i = 0; i < count; ++i) all += masses[i];
  const double target = share * all;
  Landing found{0, 0};
  for (int i = 0; i < count; ++i) {
    if (!(masses[i] > 0)) continue;
    found = {i, (target - before) / masses[i]};
    before += masses[i];
    if (before > target) break;
  }
  return found;
}

// A filter that keeps, whatever rounding says of it, the token with the largest exact steered
// logit.
struct RowFilter : Filter {
  int best = -1;

  RowFilter() : Filter(Filter::none()) {}
  bool keeps(float z, int id) const { return Filter::keeps(z, id) || id == best; }
};

// A draw that is the first sweep as well: what it looks at on the way. `all`: every sum, not only
// the maximum and the flags.
struct SumsOnTheWay {
  Sums& sums;
  bool all;
};

struct SteeredToken {
  double z;
  int id;
  double mass;  // exp((z - unit) / temperature), whichever unit
};

// Of the steered logits (as float) of a row: the largest of every kStripe tokens, and how far these
// may be off; the largest of all.
struct Tops {
  const float* of_stripes;
  float slack, top;
};

// A range of steered logits (as float) that is looked into, and what a slice has above and in it.
struct Range {
  float low, high;
  double unit;  // the steered logit whose mass counts 1
};
struct RangeFindings {
  int64_t above = 0, inside = 0;
  std::vector<SteeredToken> tokens;  // those inside, in order of id, while there is room
};

// Where the findings of a draw go; each may be null.
struct Drawn {
  Best* best;
  MassSum* masses;  // one a block of the row
  float* tops;      // one a stripe of the row
  float* slack;     // with them
};

struct Partition : PartitionOf<Math, double> {
  Best greedy = Best::none();  // argmax over the confidence set

  Partition() { clear(); }
};

struct Strengths {
  const double* mu;
  int count;
};

struct Sweeps {
  const char* name;
  // Step 2: sums, and with `candidates` those within log_alpha of the running maximum.
  void (*first_sweep)(const Slice&, double log_alpha, Sums&, Candidates*);
  // Step 11: the largest steered logit, the masses of the slice's blocks, the tops of its stripes:
  // whatever is not null. With sums, a row that turns out invalid or base-masked is left early with
  // the flag set.
  void (*draw_row)(const Slice&, const Constants&, const RowFilter&, const Draw&,
                   const SumsOnTheWay*, const Drawn&);
  // The token of a block (the slice) at which a share of its mass ends.
  int (*token_at)(const Slice&, const Constants&, const RowFilter&, const Draw&, double share);
  // Step 7.
  void (*moments)(const Slice&, const Constants&, MomentSums&);
  // One partition a strength.
  void (*partition)(const Slice&, const Constants&, const Strengths&, Partition*);
  // Step 9: the steered logits of a slice, within the range of a float.
  void (*steer)(const Slice&, const Constants&, float* z);
  // Step 10: the tokens whose steered logit is `bound` or more, in order of id, in the unit of the
  // top; false if they are more than kCapacity.
  bool (*gather)(const Slice&, const Constants&, const Draw&, const Tops&, double bound,
                 std::vector<SteeredToken>&);
  // Step 10: what lies above and in a range; masses are of the slice's blocks, above it and from
  // its low end up.
  void (*look_into)(const Slice&, const Constants&, const Draw&, const Range&, RangeFindings&,
                    MassSum* above, MassSum* from);
  // The id of the n-th token (from 1) whose steered logit (as float) equals z, or -1.
  int (*nth_tie)(const Slice&, const Constants&, float z, int64_t n);
};

const Sweeps* sweeps_portable();
const Sweeps* sweeps_avx2();    // null where the compiler or the machine lacks it
const Sweeps* sweeps_avx512();  // likewise

// The fastest sweeps this machine runs; "avx512", "avx2" or "portable" by name (null if absent).
const Sweeps* best_sweeps();
const Sweeps* named_sweeps(const char* name);

}  // namespace svdk
