// From numbers to the codes of a layer's input.

#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <vector>

#include "vectors.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

float number(const Tensor& one) {
  return *one.const_data_ptr<float>();
}

int64_t largest_code(int64_t bits) {
  return (int64_t(1) << bits) - 1;
}

// What the input of a layer is quantized with; codes of 0 to `largest`.
struct Quantizer {
  const float *smoothing, *shift;  // null where there is none
  float scale, reciprocal, zero_point, largest;
  bool two_bytes;

  Quantizer(const float* factors,
            const float* offsets,
            const Tensor& step,
            const Tensor& zero,
            int64_t bits)
      : smoothing(factors),
        shift(offsets),
        scale(number(step)),
        reciprocal(1 / scale),
        zero_point(number(zero)),
        largest(float(largest_code(bits))),
        two_bytes(bits > 8) {}

  // y / scale between the codes' bounds, rounded as a division rounds (scale: above 2^-100), without
  // one, which takes many times as long: a quotient by the reciprocal is brought right by what it
  // leaves of y (Markstein 1990, IBM J. Res. Dev. 34, 111). It is clamped before, as infinity would
  // leave no number.
  Vector quotient(Vector y) const {
    const Vector step = filled(scale), inverse = filled(reciprocal);
    const Vector first = clamped(y * inverse);
    return clamped(product_and(less_product(first, step, y), inverse, first));
  }

  Vector clamped(Vector y) const {
    return smaller(larger(y, filled(-zero_point)), filled(largest - zero_point));
  }

  // Codes of channels [c, c + WIDTH) from y, which is smoothed first. Clamped before it is rounded:
  // the bounds are whole numbers.
  void write(Vector y, int64_t c, Mask mask, uint8_t* low, uint8_t* high) const {
    if (shift) y = y - load(shift + c, mask);
    if (smoothing) y = y / load(smoothing + c, mask, filled(1.0f));
    const Integers code = sum(to_integers(quotient(y)), filled(static_cast<int32_t>(zero_point)));
    store_bytes(low, code, mask);
    if (two_bytes) store_bytes(high, second_bytes(code), mask);
  }
};

// A parameter [C] or [N, C, 1, 1] in float32, or null; without an operator's overhead.
class Floats {
 public:
  explicit Floats(const OptionalTensor& x) {
    if (!x) return;
    if (x->scalar_type() == at::kFloat && x->is_contiguous()) {
      kept_ = *x;
      return;
    }
    const int64_t channel = x->dim() > 1;  // its dimension
    const int64_t columns = x->size(channel), step = x->stride(channel);
    const int64_t rows = channel ? x->size(0) : 1, jump = channel ? x->stride(0) : 0;
    TORCH_CHECK(rows * columns == x->numel(), "a parameter varies over positions");
    copied_.reserve(x->numel());
    const auto copy = [&](const auto* from) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; ++c)
          copied_.push_back(static_cast<float>(from[i * jump + c * step]));
    };
    if (x->scalar_type() == at::kFloat)
      copy(x->const_data_ptr<float>());
    else
      copy(x->const_data_ptr<at::BFloat16>());
  }

  operator const float*() const {
    if (!copied_.empty()) return copied_.data();
    return kept_.defined() ? kept_.const_data_ptr<float>() : nullptr;
  }

 private:
  Tensor kept_;
  std::vector<float> copied_;
};

// Codes of shape `shape`, low and high bytes, the latter empty up to 8 bits.
std::pair<Tensor, Tensor> empty_codes(const std::vector<int64_t>& shape,
                                      int64_t bits,
                                      at::MemoryFormat order) {
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  Tensor low = at::empty(shape, bytes.memory_format(order));
  return {low, bits > 8 ? at::empty(shape, bytes.memory_format(order)) : at::empty({0}, bytes)};
}

}  // namespace
