// steered_sample: sweep, settle, and where the whole vocabulary is in play, sweep once more.
#include "arch_headers.h"
#include "candidates.h"
#include "ops.h"

namespace svdk {
namespace {

struct Slice {
  Sums sums;
  CandidateBuffer buffer;
  Best best = Best::none();
};

// One row on its way to a token. With several slices, first() and second() run on each in parallel
// and the others in between on one thread.
class SampleRow {
 public:
  SampleRow(const Row& row, const Parameters& p, bool info, const Sweeps& sweeps, Slice* slices,
            int count)
      : row_(row), p_(p), info_(info), sweeps_(sweeps), slices_(slices), count_(count) {
    valid_ = valid_parameters(p, row.vocab);
    const bool everything = row.direction == kPlain || p.alpha == 0;
    const bool needs_kl = row.direction == kKlGradient || p.mode != kConstant;
    one_sweep_ = valid_ && everything && !p.has_filters() && !needs_kl &&
                 (row.direction == kPlain || !info) && row.direction != kKlGradient;
    if (valid_) {
      context_.direction = row.direction;
      context_.mu = p.strength;
      log_alpha_ = log_alpha_of(row.direction, p.alpha);
      noise_ = noise_of(p);
      noise_.needs_sums = info;
    }
  }

  void first(int slice) {
    if (!valid_) return;
    Slice& s = slices_[slice];
    s = Slice{};
    if (one_sweep_) {
      sweeps_.sample(row_, from(slice), from(slice + 1), context_, RowFilter(), noise_, &s.sums,
                     s.best);
    } else {
      const bool collect = row_.direction != kPlain;
      sweeps_.sums(row_, from(slice), from(slice + 1), log_alpha_, s.sums,
                   collect ? &s.buffer : nullptr);
      s.buffer.overflow |= !collect;
    }
  }

  // True when the row needs second().
  bool settle() {
    if (!valid_) return refuse();
    merge();
    // A masked base token or a huge logit: the sweep broke off there, and the maxima and K are
    // needed.
    const bool doubtful = sums_.base_masked || sums_.beyond_float;
    const bool broke_off = one_sweep_ && doubtful && row_.direction == kLogRatio && !sums_.invalid;
    if (broke_off) {
      sums_ = Sums{};
      buffer_ = CandidateBuffer{};
      sweeps_.sums(row_, 0, row_.vocab, log_alpha_, sums_, &buffer_);
    }
    if (sums_.invalid || sums_.max_w == -kInf) return refuse();
    if (one_sweep_ && !broke_off) {
      out_.token = best_.id;
      if (info_) {
        context_.max_w = static_cast<float>(sums_.max_w);
        context_.log_zw = std::log(sums_.z_w);
        describe(context_.max_w, context_.log_zw, sums_.n_finite);
      }
      return false;
    }
    context_ = make_constants(row_, p_, sums_);
    if (!buffer_.overflow) restrict_to_c(context_, buffer_.items);
    Moments m{};
    if (p_.mode != kConstant) m = moments_of(row_, sweeps_, context_, sums_, buffer_);
    context_.mu = strength_of(row_, p_, context_, m);
    noise_.needs_sums = false;

    const bool outside =
        p_.penalty != -kInf && static_cast<int64_t>(buffer_.items.size()) != sums_.n_finite;
    std::vector<Scored> set;
    double total = -1;
    if (!buffer_.overflow && !outside) {
      for (const Candidate& c : buffer_.items)
        set.push_back({context_.steered_logit(c.warm, c.other), c.id});
    } else if (!p_.has_filters() || !select(row_, sweeps_, context_, p_, set, total, filter_)) {
      return true;
    }
    out_.token = draw(set, p_, total);
    if (info_) describe_steered(buffer_.overflow || outside ? nullptr : &set);
    return false;
  }

  void second(int slice) {
    Slice& s = slices_[slice];
    s.best = Best::none();
    sweeps_.sample(row_, from(slice), from(slice + 1), context_, filter_, noise_, nullptr, s.best);
  }

  void finish() {
    best_ = Best::none();
    for (int i = 0; i < count_; ++i) {
      if (slices_[i].best.id >= 0) best_.offer(slices_[i].best.score, slices_[i].best.id);
    }
    out_.token = best_.id;
    if (info_) describe_steered(nullptr);
  }

  const SampleOutput& out() const { return out_; }

 private:
  int from(int slice) const {
    const int blocks = (row_.vocab + kBlock - 1) / kBlock;
    return std::min<int64_t>(row_.vocab, static_cast<int64_t>(blocks) * slice / count_ * kBlock);
  }

  void merge() {
    sums_ = slices_[0].sums;
    best_ = slices_[0].best;
    buffer_.overflow = slices_[0].buffer.overflow;
    buffer_.items.swap(slices_[0].buffer.items);
    for (int i = 1; i < count_; ++i) {
      Slice& s = slices_[i];
      sums_.merge(s.sums);
      if (s.best.id >= 0) best_.offer(s.best.score, s.best.id);
      buffer_.overflow |= s.buffer.overflow;
      buffer_.items.insert(buffer_.items.end(), s.buffer.items.begin(), s.buffer.items.end());
    }
  }

  bool refuse() {
    const float nan = static_cast<float>(kNaN);
    out_ = {fallback_token(row_), nan, nan, nan, nan, nan, 0, kInvalid};
    return false;
  }

  // The steered log-sum-exp in two parts, which does not round log_sum away next to a huge top.
  void describe(double top, double log_sum, int64_t candidates) {
    const int token = static_cast<int>(out_.token);
    const float w = warm_at(row_, token), other = other_at(row_, token);
    out_.strength = static_cast<float>(context_.mu);
    out_.kl = static_cast<float>(row_.base ? context_.kl : kNaN);
    out_.logprob_warm = static_cast<float>(context_.log_p_of(w));
    out_.logprob_base = static_cast<float>(row_.base ? context_.log_q_of(other) : kNaN);
    out_.logprob_steered = static_cast<float>(context_.steered_logit(w, other) - top - log_sum);
    out_.candidates = static_cast<int32_t>(candidates);
    out_.status = sums_.base_masked ? kBaseMasked : kOk;
  }

  // `set`: everything that can be drawn; without it the whole vocabulary is summed.
  void describe_steered(const std::vector<Scored>* set) {
    double top = -kInf, sum = 0;
    if (set) {
      for (const Scored& s : *set) top = std::fmax(top, s.z);
      for (const Scored& s : *set) sum += std::exp(s.z - top);
    } else {
      Partition part;
      sweeps_.partition(row_, 0, row_.vocab, context_, &context_.mu, 1, &part);
      top = part.max;
      sum = part.z;
    }
    int64_t count = static_cast<int64_t>(buffer_.items.size());
    if (buffer_.overflow) {
      count = sums_.n_finite;
      if (log_alpha_ != -kInf) {
        count = 0;
        for (int i = 0; i < row_.vocab; ++i) count += context_.in_confidence_set(warm_at(row_, i));
      }
    }
    describe(top, std::log(sum), count);
  }

  Row row_;
  Parameters p_;
  bool info_, valid_ = false, one_sweep_ = false;
  const Sweeps& sweeps_;
  Slice* slices_;
  int count_;
  double log_alpha_ = -kInf;
  Constants context_;
  Noise noise_;
  RowFilter filter_;
  Sums sums_;
  CandidateBuffer buffer_;
  Best best_ = Best::none();
  SampleOutput out_{};
};

}  // namespace

void steered_sample(const Runtime& runtime, int64_t batch, const GetRow& row,
                    const GetParameters& parameters, bool info, SampleOutput* out) {
  if (batch == 0) return;
  // Rows alone keep the threads busy, or few rows are cut into slices.
  const int64_t blocks = (row(0).vocab + kBlock - 1) / kBlock;
  int slices = 1;
  if (batch % runtime.threads != 0 && batch < 4 * runtime.threads) {
    slices = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>(runtime.threads, blocks / kSliceBlocks)));
  }
  if (slices == 1) {
    runtime.parallel(batch, [&](int64_t i) {
      Slice slice;
      SampleRow r(row(i), parameters(i), info, *runtime.sweeps, &slice, 1);
      r.first(0);
      if (r.settle()) {
        r.second(0);
        r.finish();
      }
      out[i] = r.out();
    });
    return;
  }
  std::vector<Slice> parts(batch * slices);
  std::vector<SampleRow> rows;
  rows.reserve(batch);
  for (int64_t i = 0; i < batch; ++i) {
    rows.emplace_back(row(i), parameters(i), info, *runtime.sweeps, &parts[i * slices], slices);
  }
  runtime.parallel(batch * slices,
                   [&](int64_t t) { rows[t / slices].first(static_cast<int>(t % slices)); });
  std::vector<SampleRow*> again;
  for (SampleRow& r : rows) {
    if (r.settle()) again.push_back(&r);
  }
  if (!again.empty()) {
    runtime.parallel(static_cast<int64_t>(again.size()) * slices,
                     [&](int64_t t) { again[t / slices]->second(static_cast<int>(t % slices)); });
    for (SampleRow* r : again) r->finish();
  }
  for (int64_t i = 0; i < batch; ++i) out[i] = rows[i].out();
}

const Sweeps* best_sweeps() {
  for (const Sweeps* s : {sweeps_avx512(), sweeps_avx2()}) {
    if (s) return s;
  }
  return sweeps_portable();
}

const Sweeps* named_sweeps(const char* name) {
  for (const Sweeps* s : {sweeps_avx512(), sweeps_avx2(), sweeps_portable()}) {
    if (s && std::strcmp(s->name, name) == 0) return s;
  }
  return nullptr;
}

}  // namespace svdk
