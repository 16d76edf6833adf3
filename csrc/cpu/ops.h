// The four operations over a batch of rows, on plain pointers; how to run tasks in parallel is the
// caller's choice.
#pragma once
#include <functional>
#include <vector>

#include "arch.h"

namespace svdk {

// Runs task(0) ... task(count - 1), in any order and in parallel.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& task)>;

struct Runtime {
  Parallel parallel;
  int threads = 1;
  const Sweeps* sweeps = nullptr;
};

// A tensor of logits (or of vectors): rows picked by index, or in order.
struct Table {
  const void* data;      // or null
  int64_t stride_bytes;  // 0: one row for all
  const int64_t* index;  // or null

  const void* at(int64_t i) const {
    const int64_t row = index ? index[i] : i;
    return data ? static_cast<const char*>(data) + row * stride_bytes : nullptr;
  }
};

// The rows of a call.
struct BatchLogits {
  Table warm, base, vector;
  Table bias, allowed;  // go by the row of the call
  DType dtype;
  int vocab, direction;
  int64_t batch;

  RowLogits at(int64_t i) const {
    return {warm.at(i),
            base.at(i),
            static_cast<const float*>(vector.at(i)),
            dtype,
            vocab,
            direction,
            static_cast<const float*>(bias.at(i)),
            static_cast<const uint32_t*>(allowed.at(i))};
  }
};

struct SampleOutput {
  int64_t token;
  float strength, kl, logprob_steered, logprob_warm, logprob_base;
  int32_t candidates, status;
};

struct LogprobOutput {
  float gain, norm2, variance, kl, logprob_warm, logprob_base;
  int32_t status;
};

// Where curves go: (B, count) each.
struct LogprobCurves {
  float *logprob, *slope, *curvature;
  int64_t* greedy;
};

struct ExtractOutput {
  float kl, max_logit, lse;
  int32_t status;
  int64_t count;
};

// What the second half of extract needs of a row.
struct Extracted {
  Constants constants;
  std::vector<Candidate> tokens;  // the confidence set, unless it overflowed
  bool overflow = false;
};

// Where the entries of a row go.
struct ExtractEntries {
  int64_t* ids;
  float *p, *delta;
};

// Where steered logits go, row by row: `vocab` of a row's `width` columns, -inf in the others.
struct LogitsTo {
  void* data;
  int64_t stride_bytes;
  DType dtype;
  int vocab, width;
};

// `parameters` and `out` have an entry a row, in all of them.
void steered_sample(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                    bool info, SampleOutput* out);

// At the values of mu given, or (null) at each row's own strength.
void steered_logprob(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                     const Strengths* strengths, const LogprobCurves& curves, LogprobOutput* out);

// First half: sizes; second half: entries.
void extract_rows(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                  Extracted* extracted, ExtractOutput* out);
void extract_entries(const RowLogits& row, const Extracted& extracted, ExtractEntries to);

// `skip` (or null): rows to copy. `to` may be the warm logits, if rows are in order.
void steered_logits(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                    const bool* skip, const LogitsTo& to, int32_t* status);

}  // namespace svdk
