// steered_sample: steps 1 to 12 of every row; where the whole vocabulary is in play, its logits are
// swept once more for the draw.
#include <algorithm>

#include "filters.h"
#include "ops.h"

namespace svdk {
namespace {

struct SliceFindings {
  Sums sums;
  Candidates candidates;
  Best best = Best::none();
};

// One row on its way to a token. With several slices, first_sweep() and draw() run on each in
// parallel and the others in between on one thread.
class RowSampler {
 public:
  RowSampler(const RowLogits& row, const Parameters& p, bool info, const Sweeps& sweeps,
             SliceFindings* slices, int count)
      : row_(row), p_(p), info_(info), sweeps_(sweeps), slices_(slices), count_(count) {
    valid_ = valid_parameters(p, row.vocab);
    // Plain sampling, and steering whose direction needs nothing of the row but a constant shift:
    // the token is found in the first sweep.
    const bool everything = row.direction == kPlain || p.alpha == 0;
    one_sweep_ = valid_ && everything && !p.has_filters() && p.mode == kConstant &&
                 (row.direction == kPlain || !info) && row.direction != kKlGradient;
    if (valid_) {
      state_.constants.direction = row.direction;
      state_.constants.mu = p.strength;
      log_alpha_ = log_alpha_of(row.direction, p.alpha);
      draw_ = Draw::of(p);
      if (one_sweep_) make_room();
    }
  }

  // Step 2 (with one_sweep_: step 11 too).
  void first_sweep(int slice) {
    if (!valid_) return;
    SliceFindings& found = slices_[slice];
    found = SliceFindings{};
    if (one_sweep_) {
      const SumsOnTheWay sums{found.sums, info_};
      sweeps_.draw_row(tokens_of(slice), state_.constants, filter_, draw_, &sums, found.best,
                       masses_.data());
    } else {
      const bool collect = row_.direction != kPlain;
      sweeps_.first_sweep(tokens_of(slice), log_alpha_, found.sums,
                          collect ? &found.candidates : nullptr);
      found.candidates.overflow |= !collect;
    }
  }

  // Steps 3 to 10, and if the tokens in play are few enough 11 and 12; else true: the row needs
  // draw() and finish().
  bool needs_draw() {
    if (!valid_) return refuse();
    merge_slices();
    // A masked base token or a logit beyond float: the sweep broke off there, and the maxima and K
    // are needed.
    const bool broke_off = one_sweep_ && state_.sums.needs_maxima() && !state_.sums.invalid &&
                           row_.direction == kLogRatio;
    if (broke_off) {
      state_ = RowState{};
      sweeps_.first_sweep(whole(row_), log_alpha_, state_.sums, &state_.candidates);
    }
    if (!state_.sums.valid()) return refuse();
    Constants& c = state_.constants;
    if (one_sweep_ && !broke_off) {
      out_.token = drawn();
      if (info_) {
        c.max_w = static_cast<float>(state_.sums.max_w);
        c.log_zw = std::log(state_.sums.z_w);
        describe(c.max_w, c.log_zw, state_.sums.n_finite);
      }
      return false;
    }
    close_row(row_, p_, state_);
    Moments m{};
    if (p_.mode != kConstant) m = moments_of(row_, sweeps_, state_);
    c.mu = strength_of(row_, p_, c, m);

    ShortList list;
    const bool in_play_are_candidates =
        !state_.overflow() && (c.drops_outside() || state_.complete());
    if (in_play_are_candidates) {
      list.tokens = steered_logits(c, state_.candidates.tokens);
    } else {
      if (!p_.has_filters()) return make_room();
      FilteredRow filtered = filter_row(row_, sweeps_, c, p_);
      filter_ = filtered.filter;
      if (!filtered.is_short) return make_room();
      list = std::move(filtered.list);
    }
    out_.token = draw_candidates(list, p_);
    if (info_) describe_steered(in_play_are_candidates ? &list.tokens : nullptr);
    return false;
  }

  // Step 11 over the whole vocabulary; room has been made.
  void draw(int slice) {
    Best& best = slices_[slice].best = Best::none();
    sweeps_.draw_row(tokens_of(slice), state_.constants, filter_, draw_, nullptr, best,
                     masses_.data());
  }

  void finish() {
    best_ = Best::none();
    for (int i = 0; i < count_; ++i) offer(slices_[i].best);
    out_.token = drawn();
    if (info_) describe_steered(nullptr);
  }

  const SampleOutput& out() const { return out_; }

 private:
  int from(int slice) const {
    const int blocks = (row_.vocab + kBlock - 1) / kBlock;
    return std::min<int64_t>(row_.vocab, static_cast<int64_t>(blocks) * slice / count_ * kBlock);
  }
  Slice tokens_of(int slice) const { return {row_, from(slice), from(slice + 1)}; }

  void offer(const Best& best) {
    if (best.id >= 0) best_.offer(best.score, best.id);
  }

  // Step 3.
  void merge_slices() {
    state_.sums = slices_[0].sums;
    std::swap(state_.candidates, slices_[0].candidates);
    best_ = slices_[0].best;
    for (int i = 1; i < count_; ++i) {
      merge(state_, slices_[i].sums, slices_[i].candidates);
      offer(slices_[i].best);
    }
  }

  // For the masses of the row's blocks.
  bool make_room() {
    if (!draw_.greedy) masses_.assign((row_.vocab + kBlock - 1) / kBlock, {-kInf, 0});
    return true;
  }

  // Step 11 of a row that was swept: the argmax, or the token in the block where the uniform lands.
  int drawn() {
    if (draw_.greedy) return best_.id;
    double top = -kInf;
    for (const MassSum& block : masses_) top = std::fmax(top, block.max);
    std::vector<double> masses;
    for (const MassSum& block : masses_) {
      const double x = (block.max - top) * draw_.inverse_temperature;
      masses.push_back(x < kNoMass ? 0.0 : block.sum * std::exp(x));
    }
    const Landing at =
        land(masses.data(), static_cast<int>(masses.size()), row_uniform(p_.seed, p_.offset));
    const int begin = at.place * kBlock;
    const Slice block{row_, begin, std::min(begin + kBlock, row_.vocab)};
    return sweeps_.token_at(block, state_.constants, filter_, draw_, at.share);
  }

  bool refuse() {
    const float nan = static_cast<float>(kNaN);
    out_ = {fallback_token(row_), nan, nan, nan, nan, nan, 0, kInvalid};
    return false;
  }

  // Step 12, with the steered log-sum-exp in two parts: log_sum would be rounded away next to a top
  // beyond float.
  void describe(double top, double log_sum, int64_t candidates) {
    const Constants& c = state_.constants;
    const int token = static_cast<int>(out_.token);
    const float w = row_.warm_at(token), other = row_.other_at(token);
    out_.strength = static_cast<float>(c.mu);
    out_.kl = static_cast<float>(row_.base ? c.kl : kNaN);
    out_.logprob_warm = static_cast<float>(c.log_p_of(w));
    out_.logprob_base = static_cast<float>(row_.base ? c.log_q_of(other) : kNaN);
    out_.logprob_steered = static_cast<float>(c.steered_logit(w, other) - top - log_sum);
    out_.candidates = static_cast<int32_t>(candidates);
    out_.status = state_.sums.status();
  }

  // `tokens`: all that can be drawn, before filters; without them the whole vocabulary is summed.
  void describe_steered(const std::vector<SteeredToken>* tokens) {
    double top = -kInf, sum = 0;
    if (tokens) {
      for (const SteeredToken& s : *tokens) top = std::fmax(top, s.z);
      for (const SteeredToken& s : *tokens) sum += std::exp(s.z - top);
    } else {
      Partition part;
      const Strengths strengths{&state_.constants.mu, 1};
      sweeps_.partition(whole(row_), state_.constants, strengths, &part);
      top = part.max;
      sum = part.z;
    }
    describe(top, std::log(sum), confidence_set_size(row_, state_));
  }

  RowLogits row_;
  Parameters p_;
  bool info_, valid_ = false, one_sweep_ = false;
  const Sweeps& sweeps_;
  SliceFindings* slices_;
  int count_;
  double log_alpha_ = -kInf;
  Draw draw_;
  std::vector<MassSum> masses_;
  RowFilter filter_;
  RowState state_;
  Best best_ = Best::none();
  SampleOutput out_{};
};

// Slices a row: rows alone keep the threads busy, or few rows are cut.
int slices_a_row(const Runtime& runtime, const BatchLogits& rows) {
  if (rows.batch % runtime.threads == 0 || rows.batch >= 4 * runtime.threads) return 1;
  const int64_t blocks = (rows.vocab + kBlock - 1) / kBlock;
  return static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(runtime.threads, blocks / kSliceBlocks)));
}

}  // namespace

void steered_sample(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                    bool info, SampleOutput* out) {
  if (rows.batch == 0) return;
  const int64_t batch = rows.batch;
  const int slices = slices_a_row(runtime, rows);
  if (slices == 1) {
    runtime.parallel(batch, [&](int64_t i) {
      SliceFindings found;
      RowSampler row(rows.at(i), parameters[i], info, *runtime.sweeps, &found, 1);
      row.first_sweep(0);
      if (row.needs_draw()) {
        row.draw(0);
        row.finish();
      }
      out[i] = row.out();
    });
    return;
  }
  std::vector<SliceFindings> found(batch * slices);
  std::vector<RowSampler> samplers;
  samplers.reserve(batch);
  for (int64_t i = 0; i < batch; ++i) {
    samplers.emplace_back(rows.at(i), parameters[i], info, *runtime.sweeps, &found[i * slices],
                          slices);
  }
  runtime.parallel(batch * slices, [&](int64_t t) {
    samplers[t / slices].first_sweep(static_cast<int>(t % slices));
  });
  std::vector<RowSampler*> again;
  for (RowSampler& row : samplers) {
    if (row.needs_draw()) again.push_back(&row);
  }
  if (!again.empty()) {
    runtime.parallel(static_cast<int64_t>(again.size()) * slices,
                     [&](int64_t t) { again[t / slices]->draw(static_cast<int>(t % slices)); });
    for (RowSampler* row : again) row->finish();
  }
  for (int64_t i = 0; i < batch; ++i) out[i] = samplers[i].out();
}

}  // namespace svdk
