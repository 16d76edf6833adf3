// The three operations over a batch of rows, on plain pointers; how to run tasks in parallel is the
// caller's choice.
#pragma once
#include <functional>
#include <vector>

#include "steering.h"

namespace svdk {

// Runs task(0) ... task(count - 1), in any order and in parallel.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& task)>;

struct Runtime {
  Parallel parallel;
  int threads = 1;
  const Sweeps* sweeps = nullptr;
};

// The fastest sweeps this machine runs; "avx512", "avx2" or "portable" by name (null if absent).
const Sweeps* best_sweeps();
const Sweeps* named_sweeps(const char* name);

struct SampleOutput {
  int64_t token;
  float strength, kl, logprob_steered, logprob_warm, logprob_base;
  int32_t candidates, status;
};

struct LogprobOutput {
  float gain, norm2, variance, kl, logprob_warm, logprob_base;
  int32_t status;
};

// Where the curves of a row go: count entries each.
struct LogprobCurves {
  float *logprob, *slope, *curvature;
  int64_t* greedy;
};

struct ExtractOutput {
  float kl, max_logit, lse;
  int32_t status;
  int64_t count;
};

struct ExtractRow {
  Constants context;
  std::vector<Candidate> items;  // C, unless it overflowed
  bool overflow = false;
};

using GetRow = std::function<Row(int64_t)>;
using GetParameters = std::function<Parameters(int64_t)>;

void steered_sample(const Runtime& runtime, int64_t batch, const GetRow& row,
                    const GetParameters& parameters, bool info, SampleOutput* out);

// strengths(i) points at `count` values of mu.
void steered_logprob(const Runtime& runtime, int64_t batch, const GetRow& row,
                     const GetParameters& parameters, int count,
                     const std::function<const double*(int64_t)>& strengths,
                     const std::function<LogprobCurves(int64_t)>& curves, LogprobOutput* out);

// First half: sizes; second half: entries, written at the pointers given.
void extract_rows(const Runtime& runtime, int64_t batch, const GetRow& row,
                  const GetParameters& parameters, ExtractRow* rows, ExtractOutput* out);
void extract_entries(const Row& row, const ExtractRow& extracted, int64_t* ids, float* p,
                     float* delta);

}  // namespace svdk
