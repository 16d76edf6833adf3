// steered_logits: steps 1 to 9 of every row, written out whole. With a mask only the candidates are
// steered, and each logit is read once; else the row is swept once more.
#include <algorithm>

#include "candidates.h"
#include "ops.h"

namespace svdk {
namespace {

// One row of the output.
struct RowTo {
  void* data;
  DType dtype;

  void write(int at, const float* z, int n) const {
    uint16_t* half = static_cast<uint16_t*>(data) + at;
    if (dtype == DType::kFloat) std::copy_n(z, n, static_cast<float*>(data) + at);
    if (dtype == DType::kBFloat16) std::transform(z, z + n, half, float_to_bfloat16);
    if (dtype == DType::kHalf) std::transform(z, z + n, half, float_to_half);
  }
  void fill(int begin, int end, float z) const {
    const uint16_t half = dtype == DType::kHalf ? float_to_half(z) : float_to_bfloat16(z);
    if (dtype == DType::kFloat) {
      std::fill(static_cast<float*>(data) + begin, static_cast<float*>(data) + end, z);
    } else {
      std::fill(static_cast<uint16_t*>(data) + begin, static_cast<uint16_t*>(data) + end, half);
    }
  }
};

// Block by block, so that a row may be steered in place.
void write_row(const RowLogits& row, const Constants& c, const Sweeps& sweeps, const RowTo& to) {
  alignas(64) float z[kBlock];
  for (int at = 0; at < row.vocab; at += kBlock) {
    const Slice block{row, at, std::min(at + kBlock, row.vocab)};
    sweeps.steer(block, c, z);
    to.write(at, z, block.end - at);
  }
}

void copy_row(const RowLogits& row, const Sweeps& sweeps, const RowTo& to) {
  if (to.data == row.warm) return;
  const RowLogits plain{row.warm, nullptr, nullptr, row.dtype, row.vocab, kPlain};
  write_row(plain, Constants(), sweeps, to);
}

int steer_row(const RowLogits& row, const Parameters& p, const Sweeps& sweeps, const RowTo& to) {
  RowState state;
  if (!open_row(row, p, sweeps, state)) {
    to.fill(0, row.vocab, static_cast<float>(kNaN));
    return kInvalid;
  }
  Constants& c = state.constants;
  Moments m{};
  if (p.mode != kConstant) m = moments_of(row, sweeps, state);
  c.mu = strength_of(row, p, c, m);
  if (state.overflow() || !c.drops_outside()) {
    write_row(row, c, sweeps, to);
  } else {
    to.fill(0, row.vocab, -kFloatInf);
    for (const SteeredToken& s : steered_logits(c, state.candidates.tokens)) {
      const float z = static_cast<float>(std::fmin(std::fmax(s.z, -FLT_MAX), FLT_MAX));
      to.write(s.id, &z, 1);
    }
  }
  return state.sums.status();
}

}  // namespace

void steered_logits(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                    const bool* skip, const LogitsTo& to, int32_t* status) {
  runtime.parallel(rows.batch, [&](int64_t i) {
    const RowLogits row = rows.at(i);
    const RowTo out{static_cast<char*>(to.data) + i * to.stride_bytes, to.dtype};
    status[i] = kOk;
    if (skip && skip[i]) {
      copy_row(row, *runtime.sweeps, out);
    } else {
      status[i] = steer_row(row, parameters[i], *runtime.sweeps, out);
    }
    out.fill(to.vocab, to.width, -kFloatInf);
  });
}

}  // namespace svdk
