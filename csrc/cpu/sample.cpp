// steered_sample: steps 1 to 12 of every row; where the whole vocabulary is in play, its logits are
// swept once more for the draw.
#include <algorithm>
#include <deque>
#include <optional>

#include "filters.h"
#include "ops.h"

namespace svdk {
namespace {

// Parts of a row that threads can take: as many for every number of threads, an even number.
int slices_of(int vocab) {
  const int count = (vocab + kBlock - 1) / kBlock / kSliceBlocks;
  return count < 2 ? 1 : count / 2 * 2;
}

// What the sweeps find in a slice.
struct SliceFindings {
  Sums sums;
  Candidates candidates;
  Best best = Best::none();
  float slack = 0;
  RangeFindings range;
};

// One row on its way to a token. Its slices are swept, in any order and in parallel; between the
// sweeps advance() runs on one thread. (The slices follow from the size of the row alone, so that
// what is found does, too.)
class RowSampler {
 public:
  RowSampler(const RowLogits& row, const Parameters& p, bool info, const Sweeps& sweeps)
      : row_(row), p_(p), info_(info), sweeps_(sweeps), slices_(slices_of(row.vocab)) {
    valid_ = valid_parameters(p, row.vocab);
    // Plain sampling, and steering whose direction needs nothing of the row but a constant shift:
    // the token is found in the first sweep.
    const bool everything = row.direction == kPlain || p.alpha == 0;
    one_sweep_ = valid_ && everything && p.mode == kConstant &&
                 (row.direction == kPlain || !info) && row.direction != kKlGradient;
    if (!valid_) return;
    state_.constants.direction = row.direction;
    state_.constants.mu = p.strength;
    log_alpha_ = log_alpha_of(row.direction, p.alpha);
    draw_ = Draw::of(p);
    if (one_sweep_) make_room();
  }

  void sweep(int slice) {
    if (!valid_) return;
    SliceFindings& found = slices_[slice];
    const Slice tokens = tokens_of(slice);
    Drawn to{draw_.greedy ? &found.best : nullptr, draw_.greedy ? nullptr : masses_.data(), nullptr,
             nullptr};
    if (p_.has_filters() && phase_ != Phase::kDraw) {
      // Of plain rows the floats are exact; of steered ones the filters must not lose the best.
      if (row_.direction != kPlain) to.best = &found.best;
      if (!needs_mass()) to.masses = nullptr;
      to.tops = tops_.data();
      to.slack = &found.slack;
    }
    const Constants& c = state_.constants;
    if (phase_ == Phase::kFirst && !one_sweep_) {
      const bool collect = row_.direction != kPlain;
      sweeps_.first_sweep(tokens, log_alpha_, found.sums, collect ? &found.candidates : nullptr);
      found.candidates.overflow |= !collect;
    } else if (phase_ == Phase::kSearch) {
      found.range = RangeFindings{};
      sweeps_.look_into(tokens, c, draw_, search_->range(), found.range, above_.data(),
                        masses_.data());
    } else {
      const SumsOnTheWay sums{found.sums, info_};
      sweeps_.draw_row(tokens, c, filter_, draw_, phase_ == Phase::kFirst ? &sums : nullptr, to);
    }
  }
  int slices() const { return static_cast<int>(slices_.size()); }

  // Steps 3 to 12 as far as they get; true: the row needs one more sweep.
  bool advance() {
    switch (phase_) {
      case Phase::kFirst:
        return valid_ ? after_first_sweep() : refuse();
      case Phase::kCollect:
        return filter_row();
      case Phase::kSearch:
        return search();
      case Phase::kDraw:
        break;
    }
    return finish(drawn());
  }

  const SampleOutput& out() const { return out_; }

 private:
  enum class Phase { kFirst, kCollect, kSearch, kDraw };

  Slice tokens_of(int slice) const {
    const auto from = [&](int64_t i) {
      const int64_t blocks = (row_.vocab + kBlock - 1) / kBlock;
      return static_cast<int>(std::min<int64_t>(row_.vocab, blocks * i / slices() * kBlock));
    };
    return {row_, from(slice), from(slice + 1)};
  }
  // Whether the first step of the filters needs the mass of the row.
  bool needs_mass() const { return !by_k() && p_.top_p < 1; }
  bool by_k() const { return cuts_by_k(p_, row_.vocab); }

  bool after_first_sweep() {
    merge_slices();
    // A masked base token or a logit beyond float: the sweep broke off there, and the maxima and K
    // are needed.
    const bool broke_off = one_sweep_ && state_.sums.needs_maxima() && !state_.sums.invalid &&
                           row_.direction == kLogRatio;
    if (broke_off) {
      one_sweep_ = false;
      state_ = RowState{};
      sweeps_.first_sweep(whole(row_), log_alpha_, state_.sums, &state_.candidates);
    }
    if (!state_.sums.valid()) return refuse();
    if (one_sweep_) return p_.has_filters() ? filter_row() : finish(drawn());
    Constants& c = state_.constants;
    close_row(row_, p_, state_);
    Moments m{};
    if (p_.mode != kConstant) m = moments_of(row_, sweeps_, state_);
    c.mu = strength_of(row_, p_, c, m);
    if (state_.overflow() || !(c.drops_outside() || state_.complete())) {
      return sweep_again(p_.has_filters() ? Phase::kCollect : Phase::kDraw);
    }
    // The candidates are all that can be drawn.
    ShortList list;
    list.tokens = steered_logits(c, state_.candidates.tokens);
    if (info_) steered_ = sum_of(list.tokens);
    if (!draw_.greedy) weigh(list.tokens, p_);
    if (p_.has_filters()) filter_candidates(list, p_);
    return finish(draw_candidates(list.tokens, p_));
  }

  // Step 10 over the whole vocabulary, after a sweep that noted the tops of stripes.
  bool filter_row() {
    const MassSum total = needs_mass() ? sum_of(masses_) : MassSum{-kInf, 0};
    Tops tops{tops_.data(), 0, *std::max_element(tops_.begin(), tops_.end())};
    for (const SliceFindings& found : slices_) tops.slack = std::max(tops.slack, found.slack);
    ShortList list;
    if (needs_mass()) {
      list.total = total.sum * std::exp((total.max - tops.top) * draw_.inverse_temperature);
    }
    for (int attempt = 0;; ++attempt) {
      list.bound = filter_bound(p_, row_.vocab, tops, total, attempt);
      if (std::isnan(list.bound)) break;
      if (!sweeps_.gather(whole(row_), state_.constants, draw_, tops, list.bound, list.tokens)) {
        break;
      }
      if (filter_candidates(list, p_)) return finish(draw_candidates(list.tokens, p_));
    }
    top_ = state_.sums.max_w;
    if (row_.direction != kPlain) {
      merge_best();
      top_ = best_.score;
      filter_.best = best_.id;
    }
    if (by_k()) return look_for(p_.top_k, 0, {top_, 0});
    if (p_.top_p < 1) return look_for(0, p_.top_p, total);
    return draw_filtered();
  }

  bool look_for(int64_t k, double share, const MassSum& mass) {
    search_.emplace(row_, state_.constants, draw_, k, share, mass, filter_.floor);
    above_.assign((row_.vocab + kBlock - 1) / kBlock, {-kInf, 0});
    return sweep_again(Phase::kSearch);
  }

  bool search() {
    std::vector<const RangeFindings*> found;
    for (const SliceFindings& slice : slices_) found.push_back(&slice.range);
    if (!search_->narrow(sweeps_, found, sum_of(above_), sum_of(masses_))) return true;
    static_cast<Filter&>(filter_) = search_->filter();
    if (search_->by_k() && p_.top_p < 1) return look_for(0, p_.top_p, search_->mass());
    if (!search_->listed() || row_.direction != kPlain || min_p_floor(top_, p_) > filter_.floor) {
      return draw_filtered();
    }
    // Of a plain row the masses of all that stays are known.
    const double top = search_->mass().max;
    for (size_t i = 0; i < masses_.size(); ++i) masses_[i] = {top, search_->mass_of(above_[i])};
    for (const RangeFindings* slice : found) add_kept(slice->tokens);
    return finish(drawn());
  }

  // To the masses of blocks, those of listed tokens that stay.
  void add_kept(const std::vector<SteeredToken>& tokens) {
    for (size_t i = 0; i < tokens.size();) {
      const int block = tokens[i].id / kBlock;
      double sum = 0;
      for (; i < tokens.size() && tokens[i].id / kBlock == block; ++i) {
        const SteeredToken& t = tokens[i];
        sum += filter_.keeps(static_cast<float>(t.z), t.id) ? t.mass : 0.0;
      }
      masses_[block].sum += sum;
    }
  }

  bool draw_filtered() {
    const float floor = min_p_floor(top_, p_);
    if (floor > filter_.floor) static_cast<Filter&>(filter_) = {floor, kMaxId};
    return sweep_again(Phase::kDraw);
  }

  bool sweep_again(Phase phase) {
    phase_ = phase;
    for (SliceFindings& found : slices_) found.best = Best::none();
    return make_room();
  }

  // Step 3.
  void merge_slices() {
    state_.sums = slices_[0].sums;
    std::swap(state_.candidates, slices_[0].candidates);
    for (int i = 1; i < slices(); ++i) merge(state_, slices_[i].sums, slices_[i].candidates);
  }

  void merge_best() {
    best_ = Best::none();
    for (const SliceFindings& found : slices_) {
      if (found.best.id >= 0) best_.offer(found.best.score, found.best.id);
    }
  }

  // For the masses of the row's blocks and the tops of its stripes.
  bool make_room() {
    if (draw_.greedy) return true;
    masses_.assign((row_.vocab + kBlock - 1) / kBlock, {-kInf, 0});
    if (p_.has_filters()) tops_.assign((row_.vocab + kStripe - 1) / kStripe, -kFloatInf);
    return true;
  }

  // The masses of blocks, relative to the largest of them.
  std::vector<double> relative(const std::vector<MassSum>& blocks, double& top) const {
    top = -kInf;
    for (const MassSum& block : blocks) top = std::fmax(top, block.max);
    std::vector<double> masses;
    for (const MassSum& block : blocks) {
      const double x = (block.max - top) * draw_.inverse_temperature;
      masses.push_back(x > kNoMass ? block.sum * std::exp(x) : 0.0);
    }
    return masses;
  }
  MassSum sum_of(const std::vector<MassSum>& blocks) const {
    MassSum sum{-kInf, 0};
    for (const double mass : relative(blocks, sum.max)) sum.sum += mass;
    return sum;
  }
  static MassSum sum_of(const std::vector<SteeredToken>& tokens) {
    MassSum sum{-kInf, 0};
    for (const SteeredToken& s : tokens) sum.max = std::fmax(sum.max, s.z);
    for (const SteeredToken& s : tokens) sum.sum += std::exp(s.z - sum.max);
    return sum;
  }

  // Step 11 of a row that was swept: the argmax, or the token in the block where the uniform lands.
  int drawn() {
    if (draw_.greedy) {
      merge_best();
      return best_.id;
    }
    double top;
    const std::vector<double> masses = relative(masses_, top);
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

  bool finish(int token) {
    out_.token = token;
    if (info_) describe();
    return false;
  }

  // Step 12. The steered log-sum-exp stays in two parts: the sum would be rounded away next to a
  // top beyond float.
  void describe() {
    Constants& c = state_.constants;
    const int token = static_cast<int>(out_.token);
    if (one_sweep_) {  // a plain row
      c.max_w = static_cast<float>(state_.sums.max_w);
      c.log_zw = std::log(state_.sums.z_w);
      steered_ = {c.max_w, state_.sums.z_w};
    } else if (steered_.max == -kInf) {
      Partition part;
      const Strengths strengths{&c.mu, 1};
      sweeps_.partition(whole(row_), c, strengths, &part);
      steered_ = {part.max, part.z};
    }
    const float w = row_.warm_at(token), other = row_.other_at(token);
    out_.strength = static_cast<float>(c.mu);
    out_.kl = static_cast<float>(row_.base ? c.kl : kNaN);
    out_.logprob_warm = static_cast<float>(c.log_p_of(w));
    out_.logprob_base = static_cast<float>(row_.base ? c.log_q_of(other) : kNaN);
    const double z = c.steered_logit(w, other);
    out_.logprob_steered = static_cast<float>(z - steered_.max - std::log(steered_.sum));
    const int64_t n = one_sweep_ ? state_.sums.n_finite : confidence_set_size(row_, state_);
    out_.candidates = static_cast<int32_t>(n);
    out_.status = state_.sums.status();
  }

  RowLogits row_;
  Parameters p_;
  bool info_, valid_ = false, one_sweep_ = false;
  const Sweeps& sweeps_;
  std::vector<SliceFindings> slices_;
  Phase phase_ = Phase::kFirst;
  double log_alpha_ = -kInf, top_ = -kInf;
  Draw draw_;
  std::vector<MassSum> masses_, above_;
  std::vector<float> tops_;
  std::optional<RangeSearch> search_;
  RowFilter filter_;
  RowState state_;
  Best best_ = Best::none();
  MassSum steered_{-kInf, 0};  // of all that can be drawn, before filters, at temperature 1
  SampleOutput out_{};
};

}  // namespace

void steered_sample(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                    bool info, SampleOutput* out) {
  const int64_t batch = rows.batch;
  const bool by_row = batch % runtime.threads == 0 || batch >= 4 * runtime.threads;
  if (by_row || slices_of(rows.vocab) == 1) {
    runtime.parallel(batch, [&](int64_t i) {
      RowSampler row(rows.at(i), parameters[i], info, *runtime.sweeps);
      do {
        for (int slice = 0; slice < row.slices(); ++slice) row.sweep(slice);
      } while (row.advance());
      out[i] = row.out();
    });
    return;
  }
  std::deque<RowSampler> samplers;
  std::vector<RowSampler*> active;
  for (int64_t i = 0; i < batch; ++i) {
    samplers.emplace_back(rows.at(i), parameters[i], info, *runtime.sweeps);
    active.push_back(&samplers.back());
  }
  while (!active.empty()) {
    const int slices = active[0]->slices();
    runtime.parallel(static_cast<int64_t>(active.size()) * slices,
                     [&](int64_t t) { active[t / slices]->sweep(static_cast<int>(t % slices)); });
    const auto done = [](RowSampler* row) { return !row->advance(); };
    active.erase(std::remove_if(active.begin(), active.end(), done), active.end());
  }
  for (int64_t i = 0; i < batch; ++i) out[i] = samplers[i].out();
}

}  // namespace svdk
