// Runs a problem on every instruction set and split of the rows, and holds each answer against the
// oracle. A violation prints itself and aborts.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <set>
#include <thread>

#include "oracle.h"

namespace fuzz {

inline const Problem* running = nullptr;
inline const char* sweeps_name = "";

#define EXPECT(condition, ...)                                                               \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      std::fprintf(stderr, "%s:%d (%s): " #condition ": ", __FILE__, __LINE__, sweeps_name); \
      std::fprintf(stderr, __VA_ARGS__);                                                     \
      std::fprintf(stderr, "\n");                                                            \
      print(*running);                                                                       \
      std::abort();                                                                          \
    }                                                                                        \
  } while (0)

// Tasks in an order that is not the natural one, or on threads of their own.
inline svdk::Runtime runtime(const svdk::Sweeps* sweeps, int threads, bool real_threads) {
  svdk::Runtime r;
  r.sweeps = sweeps;
  r.threads = threads;
  r.parallel = [=](int64_t count, const std::function<void(int64_t)>& task) {
    if (!real_threads) {
      for (int64_t i = count; i-- > 0;) task(i);
      return;
    }
    std::vector<std::thread> workers;
    for (int k = 0; k < threads; ++k) {
      workers.emplace_back([&, k] {
        for (int64_t i = k; i < count; i += threads) task(i);
      });
    }
    for (std::thread& worker : workers) worker.join();
  };
  return r;
}

inline bool near(double got, double want, double error) {
  if (std::isnan(want) || std::isinf(want) || error == svdk::kInf) {
    return error == svdk::kInf || (std::isnan(want) ? std::isnan(got) : got == want);
  }
  if (std::fabs(want) + error >= kFloatMax) return true;  // float cannot hold it
  return std::fabs(got - want) <= error + 1e-6 * std::fabs(want) + 1e-37;
}

// For every token: whether it may, and whether it must, survive top-k, top-p and min-p.
struct Kept {
  std::vector<char> may, must;
};

inline Kept filters(const std::vector<Value>& v, const Oracle& r, const svdk::Parameters& q) {
  const int vocab = static_cast<int>(v.size());
  Kept kept{std::vector<char>(vocab, 1), std::vector<char>(vocab, 1)};
  const bool on = q.temperature > 0 && (q.top_k > 0 || q.top_p < 1 || q.min_p > 0);
  std::vector<double> low(vocab), high(vocab);
  double top_low = -svdk::kInf, top_high = -svdk::kInf;
  for (int t = 0; t < vocab; ++t) {
    kept.may[t] = kept.must[t] = v[t].z != -svdk::kInf;
    // Filters over a large vocabulary compare floats.
    const double rounding = vocab > svdk::kCapacity && r.direction != svdk::kPlain
                                ? 1e-6 * (std::fabs(v[t].z) + std::fabs(r.w[t]) +
                                          std::fabs(r.mu) * (std::fabs(r.kl) + 1))
                                : 1e-13 * std::fabs(v[t].z);
    low[t] = kept.may[t] ? v[t].z - v[t].error - rounding : -svdk::kInf;
    high[t] = kept.may[t] ? v[t].z + v[t].error + rounding : -svdk::kInf;
    top_low = std::fmax(top_low, low[t]);
    top_high = std::fmax(top_high, high[t]);
  }
  if (!on) return kept;
  // Values beyond float's range are all one to the histograms of a large vocabulary.
  if (vocab > svdk::kCapacity && (top_high > 1e38 || top_low < -1e38) &&
      r.direction != svdk::kPlain) {
    std::fill(kept.must.begin(), kept.must.end(), 0);
    return kept;
  }
  // Tokens with the same operands are exactly equal in every kernel, and the lower id comes first;
  // but for the floats that stand for a large vocabulary, which one block rounds otherwise than
  // another.
  std::vector<int> order(vocab), twins_before(vocab, 0), twins(vocab, 1);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return r.w[a] != r.w[b] ? r.w[a] < r.w[b] : r.o[a] < r.o[b];
  });
  const bool floats = vocab > svdk::kCapacity && r.direction != svdk::kPlain;
  for (int a = 0; a < vocab && !floats;) {
    int b = a;
    while (b < vocab && r.w[order[b]] == r.w[order[a]] && r.o[order[b]] == r.o[order[a]]) ++b;
    for (int k = a; k < b; ++k) twins_before[order[k]] = k - a, twins[order[k]] = b - a;
    a = b;
  }
  auto descending = [&](const std::vector<double>& by) {
    std::vector<int> ids(vocab);
    std::iota(ids.begin(), ids.end(), 0);
    std::sort(ids.begin(), ids.end(), [&](int a, int b) { return by[a] > by[b]; });
    return ids;
  };
  const std::vector<int> by_low = descending(low), by_high = descending(high);
  // Of the tokens in `ids`, by falling `key`: how many of the first have a key above x.
  auto above = [&](const std::vector<int>& ids, const std::vector<double>& key, double x,
                   bool or_equal) {
    return std::partition_point(ids.begin(), ids.end(),
                                [&](int t) { return or_equal ? key[t] >= x : key[t] > x; }) -
           ids.begin();
  };
  if (q.top_k > 0 && q.top_k < vocab) {
    for (int t = 0; t < vocab; ++t) {
      if (!kept.may[t]) continue;
      kept.may[t] = above(by_low, low, high[t], false) < q.top_k;
      kept.must[t] = above(by_high, high, low[t], true) - twins[t] < q.top_k;
    }
  }
  const double top = top_high;
  auto weight = [&](int t) { return std::exp((v[t].z - top) / q.temperature); };
  auto blur = [&](int t) {
    return std::exp((v[t].error + 1e-13 * std::fabs(v[t].z)) / q.temperature);
  };
  if (q.top_p < 1) {
    double least = 0, most = 0;
    for (int t = 0; t < vocab; ++t) {
      if (kept.may[t]) most += weight(t) * blur(t);
      if (kept.must[t]) least += weight(t) / blur(t);
    }
    std::vector<double> sure{0}, possible{0};  // mass of the first tokens of by_low and by_high
    for (int k = 0; k < vocab; ++k) {
      sure.push_back(sure.back() +
                     (kept.must[by_low[k]] ? weight(by_low[k]) / blur(by_low[k]) : 0));
      possible.push_back(possible.back() +
                         (kept.may[by_high[k]] ? weight(by_high[k]) * blur(by_high[k]) : 0));
    }
    Kept next = kept;
    for (int t = 0; t < vocab; ++t) {
      if (!kept.may[t]) continue;
      const double before_sure =
          sure[above(by_low, low, high[t], false)] + twins_before[t] * weight(t) / blur(t);
      const double before_possible = possible[above(by_high, high, low[t], true)] -
                                     (twins[t] - twins_before[t]) * weight(t) * blur(t);
      next.may[t] = !(before_sure >= q.top_p * most * (1 + 2e-5));
      next.must[t] = kept.must[t] && before_possible < q.top_p * least * (1 - 2e-5);
    }
    kept = next;
  }
  const double lowest = std::log(q.min_p);
  for (int t = 0; t < vocab && q.min_p > 0; ++t) {
    const double margin = 1e-12 * (1 + std::fabs(lowest));
    kept.may[t] = kept.may[t] && !((high[t] - top_low) / q.temperature < lowest - margin);
    kept.must[t] = kept.must[t] && (low[t] - top_high) / q.temperature >= lowest + margin;
  }
  for (int t = 0; t < vocab; ++t) {
    if (v[t].z != -svdk::kInf && high[t] >= top_low)
      kept.may[t] = 1;  // the best token always stays
  }
  return kept;
}

// The token drawn must be allowed and, within rounding, the best of all that must be allowed, or
// the one in whose share of the mass the uniform is.
inline void check_token(const Oracle& r, const svdk::Parameters& q, int64_t token) {
  const int vocab = static_cast<int>(r.w.size());
  std::vector<Value> v(vocab);
  for (int t = 0; t < vocab; ++t) v[t] = steered(r, q, t, r.mu, r.mu_error);
  EXPECT(v[token].z != -svdk::kInf, "token %ld was masked", static_cast<long>(token));
  if (r.mu_error == svdk::kInf || r.edge) return;
  const Kept kept = filters(v, r, q);
  EXPECT(kept.may[token], "token %ld was filtered out", static_cast<long>(token));
  if (q.temperature == 0) {
    const double got = v[token].z + v[token].error;
    for (int t = 0; t < vocab; ++t) {
      if (!kept.must[t]) continue;
      EXPECT(got >= v[t].z - v[t].error, "greedy took %ld with %.17g, %d has %.17g",
             static_cast<long>(token), v[token].z, t, v[t].z);
      const bool twin = t < token && r.w[t] == r.w[token] && r.o[t] == r.o[token];
      EXPECT(!twin, "greedy took %ld, of its equals %d is lower", static_cast<long>(token), t);
    }
    return;
  }
  double top = -svdk::kInf;
  for (const Value& x : v) top = std::fmax(top, x.z);
  // Float loops add rounding of their own, of the size of the logits.
  auto mass = [&](int t, double sign) {
    const double error = v[t].error + 4e-7 * (std::fabs(v[t].z) + std::fabs(r.w[t] - v[t].z));
    return std::exp((v[t].z - top + sign * error) / q.temperature) * (1 + sign * 1e-5);
  };
  double before = 0, through = 0, from_here = 0, after = 0;  // the least, the most, the most, ...
  for (int t = 0; t < vocab; ++t) {
    if (kept.must[t] && t < token) before += mass(t, -1);
    if (kept.must[t] && t > token) after += mass(t, -1);
    if (kept.may[t] && t <= token) through += mass(t, 1);
    if (kept.may[t] && t >= token) from_here += mass(t, 1);
  }
  const double u = svdk::row_uniform(q.seed, q.offset);
  EXPECT(!(u < before / (before + from_here) - 1e-9), "token %ld is behind the uniform %.17g",
         static_cast<long>(token), u);
  EXPECT(!(1 - u < after / (after + through) - 1e-9), "token %ld is before the uniform %.17g",
         static_cast<long>(token), u);
}

// log softmax(z_hat)(label), its error, and the largest error in z among tokens that matter.
struct Score {
  double logprob, error, blur;
  double mean = 0, variance = 0, largest = 0;  // of what moves with mu
};

inline Score score(const Oracle& r, const svdk::Parameters& q, double mu, int64_t label) {
  const int vocab = static_cast<int>(r.w.size());
  std::vector<double> z(vocab);
  double top = -svdk::kInf, blur = 0;
  std::vector<Value> v(vocab);
  for (int t = 0; t < vocab; ++t) {
    v[t] = steered(r, q, t, mu, 0);
    z[t] = v[t].z;
    top = std::fmax(top, z[t]);
  }
  Score s{};
  double sum = 0;
  for (int t = 0; t < vocab; ++t) {
    // Float loops add rounding of their own: of the size of the logits, and of mu delta.
    v[t].error += 4e-7 * (std::fabs(z[t]) + std::fabs(r.w[t] - z[t]));
    if (z[t] == -svdk::kInf || z[t] + v[t].error < top - 40 - v[t].error) continue;
    blur = std::fmax(blur, v[t].error);
  }
  auto move = [&](int t) {
    return r.inside[t] ? r.delta[t] : std::isinf(q.penalty) ? 0.0 : q.penalty;
  };
  for (int t = 0; t < vocab; ++t) {
    if (z[t] == -svdk::kInf) continue;
    const double e = std::exp(z[t] - top);
    sum += e;
    s.mean += e * move(t);
    if (e > 0) s.largest = std::fmax(s.largest, std::fabs(move(t)));
  }
  s.mean /= sum;
  for (int t = 0; t < vocab; ++t) {
    if (z[t] != -svdk::kInf)
      s.variance += std::exp(z[t] - top) / sum * (move(t) - s.mean) * (move(t) - s.mean);
  }
  s.logprob = z[label] - top - std::log(sum);
  s.blur = blur;
  s.error = blur + v[label].error + 3 * kFloatSum;
  return s;
}

// What does not depend on how a problem is run, computed once.
struct Known {
  std::vector<Oracle> rows;
  std::vector<std::set<int64_t>> good_tokens;  // of steered_sample, a row
  std::vector<std::map<int, std::set<int64_t>>>
      good_greedy;  // of steered_logprob, a row and strength
  std::vector<std::map<int, Score>> scores;
};

inline void check_sample(const Problem& p, const svdk::Runtime& run, Known& known) {
  std::vector<svdk::SampleOutput> out(p.batch);
  svdk::steered_sample(run, p.rows(), p.parameters.data(), p.info, out.data());
  for (int i = 0; i < p.batch; ++i) {
    const Oracle& r = known.rows[i];
    const svdk::Parameters& q = p.parameters[i];
    const svdk::SampleOutput& got = out[i];
    EXPECT(got.token >= 0 && got.token < p.vocab, "token %ld", static_cast<long>(got.token));
    if (r.invalid) {
      EXPECT(got.token == r.fallback_token, "%ld, fallback %ld", static_cast<long>(got.token),
             static_cast<long>(r.fallback_token));
      EXPECT(!p.info || (got.status == svdk::kInvalid && std::isnan(got.kl)), "status %d",
             got.status);
      continue;
    }
    if (known.good_tokens[i].insert(got.token).second) check_token(r, q, got.token);
    if (!p.info) continue;
    EXPECT(got.status == (r.base_masked ? svdk::kBaseMasked : svdk::kOk), "status %d", got.status);
    EXPECT(r.edge || got.candidates == r.candidates, "%d candidates, not %ld", got.candidates,
           static_cast<long>(r.candidates));
    EXPECT(near(got.kl, p.uses == 0 ? r.kl : svdk::kNaN, r.kl_error), "kl %g, not %g +- %g", got.kl,
           r.kl, r.kl_error);
    EXPECT(near(got.strength, r.mu, r.mu_error), "mu %.9g, not %.9g +- %g", got.strength, r.mu,
           r.mu_error);
    EXPECT(near(got.logprob_warm, r.log_p_of(got.token), 2 * kFloatSum), "log p %g",
           got.logprob_warm);
    const double base = p.uses != 0 ? svdk::kNaN : r.log_q_of(got.token);
    EXPECT(near(got.logprob_base, base, 2 * kFloatSum), "log q %g, not %g", got.logprob_base, base);
  }
}

inline void check_logprob(const Problem& p, const svdk::Runtime& run, Known& known) {
  const int count = static_cast<int>(p.strengths.size());
  const size_t cells = static_cast<size_t>(p.batch) * count;
  std::vector<float> logprob(cells), slope(cells), curvature(cells);
  std::vector<int64_t> greedy(cells);
  std::vector<svdk::LogprobOutput> out(p.batch);
  const svdk::Strengths strengths{p.strengths.data(), count};
  svdk::steered_logprob(run, p.rows(), p.parameters.data(), &strengths,
                        {logprob.data(), slope.data(), curvature.data(), greedy.data()},
                        out.data());
  for (int i = 0; i < p.batch; ++i) {
    const Oracle& r = known.rows[i];
    svdk::Parameters q = p.parameters[i];
    EXPECT(out[i].status == (r.invalid       ? svdk::kInvalid
                             : r.base_masked ? svdk::kBaseMasked
                                             : svdk::kOk),
           "status %d", out[i].status);
    for (int m = 0; m < count; ++m) {
      const size_t at = static_cast<size_t>(i) * count + m;
      EXPECT(greedy[at] >= 0 && greedy[at] < p.vocab, "greedy %ld", static_cast<long>(greedy[at]));
      if (r.invalid) {
        EXPECT(greedy[at] == r.fallback_token && std::isnan(logprob[at]), "greedy %ld",
               static_cast<long>(greedy[at]));
        continue;
      }
      if (r.edge) continue;
      const double mu = p.strengths[m];
      if (!known.scores[i].count(m)) known.scores[i][m] = score(r, q, mu, q.label);
      const Score& want = known.scores[i][m];
      EXPECT(near(logprob[at], want.logprob, want.error), "m=%d logprob %.9g, not %.9g +- %g", m,
             logprob[at], want.logprob, want.error);
      EXPECT(curvature[at] >= 0, "curvature %g", curvature[at]);
      if (want.blur < 1e-3 && want.logprob != -svdk::kInf) {
        const double move = r.inside[q.label] ? r.delta[q.label] : q.penalty;
        const double off =
            (3 * want.blur + 1e-5) * want.largest + r.delta_error[q.label] + r.mean_error;
        EXPECT(near(slope[at], move - want.mean, off), "m=%d slope %.9g, not %.9g +- %g", m,
               slope[at], move - want.mean, off);
        EXPECT(near(curvature[at], want.variance, off * (want.largest + off)),
               "m=%d curvature %g, not %g +- %g", m, curvature[at], want.variance,
               off * (want.largest + off));
      }
      if (!known.good_greedy[i][m].insert(greedy[at]).second) continue;
      svdk::Parameters greedily = q;
      greedily.penalty = -svdk::kInf;
      greedily.temperature = 0;
      Oracle at_mu = r;
      at_mu.mu = mu;
      at_mu.mu_error = 0;
      check_token(at_mu, greedily, greedy[at]);
    }
    if (r.invalid) continue;
    const double label_error = r.delta_error[q.label];
    EXPECT(r.edge || near(out[i].gain, r.delta[q.label] - r.mean, label_error + r.mean_error),
           "gain %g, not %g; delta %g mean %g errors %g %g kl %g (%g)", out[i].gain,
           r.delta[q.label] - r.mean, r.delta[q.label], r.mean, label_error, r.mean_error, r.kl,
           out[i].kl);
    EXPECT(r.edge || near(out[i].norm2, r.norm2, r.norm2_error), "norm2 %g, not %g", out[i].norm2,
           r.norm2);
    EXPECT(r.edge || near(out[i].variance, r.variance, r.variance_error),
           "variance %g, not %g +- %g", out[i].variance, r.variance, r.variance_error);
    EXPECT(near(out[i].kl, p.uses == 0 ? r.kl : svdk::kNaN, r.kl_error), "kl %g, not %g", out[i].kl,
           r.kl);
  }
}

inline void check_extract(const Problem& p, const svdk::Runtime& run, Known& known) {
  std::vector<svdk::Extracted> extracted(p.batch);
  std::vector<svdk::ExtractOutput> out(p.batch);
  svdk::extract_rows(run, p.rows(), p.parameters.data(), extracted.data(), out.data());
  for (int i = 0; i < p.batch; ++i) {
    const Oracle& r = known.rows[i];
    const int64_t count = out[i].count;
    EXPECT(out[i].status == (r.invalid       ? svdk::kInvalid
                             : r.base_masked ? svdk::kBaseMasked
                                             : svdk::kOk),
           "status %d", out[i].status);
    EXPECT(count >= 0 && (r.edge || count == r.candidates), "%ld entries, not %ld",
           static_cast<long>(count), static_cast<long>(r.candidates));
    if (r.invalid) continue;
    std::unique_ptr<int64_t[]> ids(new int64_t[count]);
    std::unique_ptr<float[]> prob(new float[count]), delta(new float[count]);
    svdk::extract_entries(p.rows().at(i), extracted[i], {ids.get(), prob.get(), delta.get()});
    for (int64_t k = 0; k < count; ++k) {
      EXPECT(ids[k] >= 0 && ids[k] < p.vocab && (k == 0 || ids[k] > ids[k - 1]), "id %ld",
             static_cast<long>(ids[k]));
      const int64_t t = ids[k];
      EXPECT(r.edge || r.inside[t], "%ld is outside C", static_cast<long>(t));
      EXPECT(near(prob[k], r.p[t], 1e-5 * r.p[t]), "p %g, not %g", prob[k], r.p[t]);
      EXPECT(r.edge || near(delta[k], r.delta[t], r.delta_error[t]),
             "delta %g, not %g +- %g; row %d kl %.9g, not %.9g lse %.9g not %.9g", delta[k],
             r.delta[t], r.delta_error[t], i, out[i].kl, r.kl, out[i].lse, r.max_w + r.log_zw);
    }
    EXPECT(near(out[i].lse, r.max_w + r.log_zw, kFloatSum), "lse %g, not %g", out[i].lse,
           r.max_w + r.log_zw);
  }
}

inline void check(const Problem& p, bool real_threads) {
  running = &p;
  Known known;
  for (int i = 0; i < p.batch; ++i) known.rows.push_back(solve(p, i));
  known.good_tokens.resize(p.batch);
  known.good_greedy.resize(p.batch);
  known.scores.resize(p.batch);
  for (const char* name : {"portable", "avx2", "avx512"}) {
    const svdk::Sweeps* sweeps = svdk::named_sweeps(name);
    if (!sweeps) continue;
    sweeps_name = name;
    for (int threads : {1, 2, 5}) {
      const svdk::Runtime run = runtime(sweeps, threads, real_threads);
      if (p.operation == kSample) check_sample(p, run, known);
      if (p.operation == kLogprob) check_logprob(p, run, known);
      if (p.operation == kExtract) check_extract(p, run, known);
      if (p.operation != kSample) break;  // these never split a row
    }
  }
}

}  // namespace fuzz
