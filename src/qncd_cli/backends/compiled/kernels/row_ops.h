// What works on rows: gated linear units and attention.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>

#include "matmul.h"

namespace {

constexpr int64_t GATED_BYTES = int64_t(1) << 22;  // of a product that is gated at once

// Codes [rows, C] of first gelu(second), the two halves of x [rows, 2 C], which is contiguous.
void gate(const Tensor& x, const Quantizer& quantizer, uint8_t* low, uint8_t* high) {
  const int64_t channels = x.size(-1) / 2, rows = x.numel() / (2 * channels);
  const auto work = [&](const auto* from) {
    at::parallel_for(0, rows, 8, [&, q = quantizer](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t c = 0; c < channels; c += WIDTH) {
          const Mask mask = mask_of(channels - c);
          const auto* at = from + 2 * row * channels + c;
          const Vector y = load(at, mask) * gelu(load(at + channels, mask));
          q.write(y, c, mask, low + row * channels + c, high + row * channels + c);
        }
    });
  };
  if (x.scalar_type() == at::kFloat)
    work(x.const_data_ptr<float>());
  else
    work(x.const_data_ptr<at::BFloat16>());
}

// x [..., 2 C] -> codes uint8 [..., C] of (first gelu(second) - shift) / smoothing, x's two halves
// (GEGLU: Shazeer, arXiv 2002.05202); the rest as in image_codes.
std::tuple<Tensor, Tensor> gated_codes(const Tensor& given,
                                       const OptionalTensor& smoothing,
                                       const OptionalTensor& shift,
                                       const Tensor& scale,
                                       const Tensor& zero_point,
                                       int64_t bits) {
  const Tensor x = given.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() /= 2;
  const Floats s(smoothing), d(shift);
  const Quantizer q(s, d, scale, zero_point, bits);
  auto [low, high] = empty_codes(shape, bits, at::MemoryFormat::Contiguous);
  gate(x, q, low.mutable_data_ptr<uint8_t>(), high.mutable_data_ptr<uint8_t>());
  return {low, high};
}

// gated_codes of a linear layer's output, which is made a few rows at a time and stays in the
// cache: `multiply` of the first seven operands.
std::tuple<Tensor, Tensor> gated_product_codes(const Tensor& given,
                                               const OptionalTensor& given_high,
                                               const Tensor& given_scale,
                                               const Tensor& given_zero_point,
                                               const OptionalTensor& bias,
                                               std::string key,
                                               at::ScalarType dtype,
                                               const OptionalTensor& smoothing,
                                               const OptionalTensor& shift,
                                               const Tensor& scale,
                                               const Tensor& zero_point,
                                               int64_t bits) {
  const Tensor x = given.flatten(0, -2);
  OptionalTensor x_high = given_high;
  if (given_high) x_high = given_high->flatten(0, -2);
  const int64_t rows = x.size(0);
  const int64_t width = layer_of(key, given, dtype, false).weight_scales[0].numel();
  std::vector<int64_t> shape = given.sizes().vec();
  shape.back() = width / 2;
  const Floats s(smoothing), d(shift);
  const Quantizer q(s, d, scale, zero_point, bits);
  auto [low, high] = empty_codes(shape, bits, at::MemoryFormat::Contiguous);
  uint8_t *lows = low.mutable_data_ptr<uint8_t>(), *highs = high.mutable_data_ptr<uint8_t>();
  const int64_t parts = (4 * rows * width + GATED_BYTES - 1) / GATED_BYTES;
  const int64_t size = (rows + parts - 1) / parts;
  for (int64_t from = 0; from < rows; from += size) {
    const int64_t count = std::min(size, rows - from), place = from * width / 2;
    OptionalTensor part_high;
    if (x_high) part_high = x_high->narrow(0, from, count);
    const Tensor product = multiply(x.narrow(0, from, count), part_high, given_scale,
                                    given_zero_point, bias, key, dtype, false);
    gate(product, q, lows + place, highs + place);
  }
  return {low, high};
}

// Of one row of scores, (sums + added) factor: exponentials less the largest into `powers`, their
// sum.
float exponentials_of(
    const int32_t* sums, const int32_t* added, int64_t keys, float factor, float* powers) {
  Integers most = filled(INT32_MIN);
  for (int64_t k = 0; k < keys; k += WIDTH) {
    const Mask mask = mask_of(keys - k);
    most = larger_where(mask, most, sum(load(sums + k, mask), load(added + k, mask)));
  }
  const Integers largest = filled(largest_of(most));
  Vector total = filled(0.0f);
  for (int64_t k = 0; k < keys; k += WIDTH) {
    const Mask mask = mask_of(keys - k);
    const Integers score = sum(load(sums + k, mask), load(added + k, mask));
    const Vector power = exponential(to_floats(difference(score, largest)) * filled(factor));
    store(powers + k, power, mask);
    total = sum_where(mask, total, power);
  }
  return sum_of(total);
}

// Of one row of scores the signed codes of softmax(factor (sums + added)) less 128, into `codes`, and
// their sum. A probability of 1 has the code `largest`. powers: room for as many numbers.
int32_t softmax_codes(const int32_t* sums,
                      const int32_t* added,
                      int64_t keys,
                      float factor,
                      float largest,
                      float* powers,
                      int8_t* codes) {
  const Vector scale = filled(largest / exponentials_of(sums, added, keys, factor, powers));
  Integers total = filled(int32_t(0));
  for (int64_t k = 0; k < keys; k += WIDTH) {
    const Mask mask = mask_of(keys - k);
    const Vector p = load(powers + k, mask) * scale;
    const Integers code = difference(to_integers(p), filled(int32_t(128)));
    store_bytes(codes + k, code, mask);
    total = sum_where(mask, total, code);
  }
  return sum_of(total);
}

// Probabilities of one row of scores, softmax(scale scores), in their place. largest: of their codes,
// which they become if it is not 0.
void probabilities_of(float* scores, int64_t keys, float scale, float largest) {
  Vector most = filled(-INFINITY), total = filled(0.0f);
  for (int64_t k = 0; k < keys; k += WIDTH) {
    const Mask mask = mask_of(keys - k);
    most = larger_where(mask, most, load(scores + k, mask));
  }
  const Vector above = filled(largest_of(most)), times = filled(scale);
  for (int64_t k = 0; k < keys; k += WIDTH) {
    const Mask mask = mask_of(keys - k);
    const Vector power = exponential((load(scores + k, mask) - above) * times);
    store(scores + k, power, mask);
    total = sum_where(mask, total, power);
  }
  const Vector factor = filled((largest != 0 ? largest : 1) / sum_of(total));
  for (int64_t k = 0; k < keys; k += WIDTH) {
    const Mask mask = mask_of(keys - k);
    Vector p = load(scores + k, mask) * factor;
    if (largest != 0) p = rounded(p);
    store(scores + k, p, mask);
  }
}

constexpr int64_t SCORES = int64_t(1) << 18;  // that a thread holds at once
constexpr int64_t WIDE_SCORES = int64_t(1) << 20;  // the same where keys come in parts
constexpr int64_t KEYS = int64_t(1) << 18;  // values of a part of the keys, which stays in the cache

// scores [rows, K] = q k^T, of q [rows, d] and k [d, K], a part of the keys at a time.
void scores_of(Tensor& scores, const Tensor& q, const Tensor& k, int64_t part) {
  for (int64_t from = 0; from < k.size(1); from += part) {
    const int64_t count = std::min(part, k.size(1) - from);
    Tensor columns = scores.narrow(1, from, count);
    at::mm_out(columns, q, k.narrow(1, from, count));
  }
}

// output [rows, d] = p v, of p [rows, K] and v [K, d], a part of the keys at a time.
void values_of(Tensor& output, const Tensor& p, const Tensor& v, int64_t part) {
  for (int64_t from = 0; from < v.size(0); from += part) {
    const int64_t count = std::min(part, v.size(0) - from);
    const Tensor columns = p.narrow(1, from, count), rows = v.narrow(0, from, count);
    if (from)
      output.addmm_(columns, rows);
    else
      at::mm_out(output, columns, rows);
  }
}

// query [N, heads, L, d], key and value [N, heads, K, d], float32 -> p value [N, heads, L, d] with
// p = softmax(scale query key^T), rounded to codes of `bits` up to 16. A few queries at a time, whose
// scores stay in the cache (Rabe & Staats, arXiv 2112.05682, but with all keys at once).
Tensor attention(const Tensor& query,
                 const Tensor& key,
                 const Tensor& value,
                 double scale,
                 int64_t bits) {
  const int64_t queries = query.size(2), keys = key.size(2), heads = query.size(0) * query.size(1);
  const Tensor q = query.contiguous().flatten(0, 1), v = value.contiguous().flatten(0, 1);
  const Tensor k = key.contiguous().flatten(0, 1).transpose(1, 2);
  Tensor output = at::empty({heads, queries, v.size(2)}, q.options());
  const int64_t width = std::max({int64_t(1), q.size(2), v.size(2)});
  const int64_t part = std::max<int64_t>(KEYS / width, 16);
  const int64_t at_once = part < keys ? WIDE_SCORES : SCORES;
  const int64_t size = std::clamp<int64_t>(at_once / keys, std::min<int64_t>(16, queries), queries);
  const int64_t blocks = (queries + size - 1) / size;
  const float largest = bits <= 16 ? float(largest_code(bits)) : 0;
  at::parallel_for(0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode guard;
    const Tensor kept = at::empty({size, keys}, q.options());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, from = i % blocks * size;
      const int64_t count = std::min(size, queries - from);
      Tensor scores = kept.narrow(0, 0, count);
      Tensor result = output.select(0, head).narrow(0, from, count);
      scores_of(scores, q.select(0, head).narrow(0, from, count), k.select(0, head), part);
      float* first = scores.mutable_data_ptr<float>();
      for (int64_t row = 0; row < count; ++row)
        probabilities_of(first + row * keys, keys, float(scale), largest);
      values_of(result, scores, v.select(0, head), part);
      if (largest != 0) result.mul_(1 / largest);
    }
  });
  return output.unflatten(0, {query.size(0), query.size(1)});
}

constexpr int64_t SUMMED_IN_FLOATS = 1 << 10;  // as in quant/integer_products.py

// output int32 [M, N] = a b, of a int8 [M, K] and b int8 [K, N].
void product(Tensor& output, const Tensor& a, const Tensor& b) {
  if (at::cpu::is_avx512_vnni_supported()) {
    at::_int_mm_out(output, a, b);
    return;
  }
  for (int64_t from = 0; from < a.size(1); from += SUMMED_IN_FLOATS) {
    const int64_t count = std::min(SUMMED_IN_FLOATS, a.size(1) - from);
    const Tensor columns = a.narrow(1, from, count), rows = b.narrow(0, from, count);
    const Tensor sums = at::mm(columns.to(at::kFloat), rows.to(at::kFloat)).to(at::kInt);
    if (from)
      output.add_(sums);
    else
      output.copy_(sums);
  }
}

// a int8 [B, M, K], b int8 [B, K, N] -> a b, int32 [B, M, N].
Tensor matmul(const Tensor& a, const Tensor& b) {
  Tensor output = at::empty({a.size(0), a.size(1), b.size(2)}, a.options().dtype(at::kInt));
  for (int64_t i = 0; i < a.size(0); ++i) {
    Tensor here = output.select(0, i);
    product(here, a.select(0, i), b.select(0, i));
  }
  return output;
}

// query int8 [B, L, d], key and value int8 [B, K, d], added int32 [B, K], factor float32: one number
// -> p value, int32 [B, L, d], with p the signed codes of softmax(factor (query key^T + added)) less
// 128, and the sum of each row of p, int32 [B, L]. A few queries at a time, as in `attention`.
std::tuple<Tensor, Tensor> byte_attention(const Tensor& query,
                                          const Tensor& key,
                                          const Tensor& value,
                                          const Tensor& given_added,
                                          const Tensor& factor,
                                          int64_t bits) {
  const int64_t heads = query.size(0), queries = query.size(1), keys = key.size(1);
  const Tensor q = query.contiguous(), k = key.contiguous().transpose(1, 2);
  const Tensor v = value.contiguous(), added = given_added.contiguous();
  Tensor output = at::empty({heads, queries, v.size(2)}, q.options().dtype(at::kInt));
  Tensor totals = at::empty({heads, queries}, output.options());
  const auto* more = added.const_data_ptr<int32_t>();
  auto* of_rows = totals.mutable_data_ptr<int32_t>();
  const float times = number(factor), largest = float(largest_code(bits));
  const int64_t size = std::clamp<int64_t>(SCORES / keys, std::min<int64_t>(16, queries), queries);
  const int64_t blocks = (queries + size - 1) / size;
  at::parallel_for(0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode guard;
    const Tensor all_sums = at::empty({size, keys}, output.options());
    const Tensor all_codes = at::empty({size, keys}, q.options());
    std::vector<float> powers(keys);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, from = i % blocks * size;
      const int64_t count = std::min(size, queries - from);
      Tensor sums = all_sums.narrow(0, 0, count), codes = all_codes.narrow(0, 0, count);
      Tensor result = output.select(0, head).narrow(0, from, count);
      product(sums, q.select(0, head).narrow(0, from, count), k.select(0, head));
      const auto* scores = sums.const_data_ptr<int32_t>();
      auto* p = codes.mutable_data_ptr<int8_t>();
      for (int64_t row = 0; row < count; ++row)
        of_rows[head * queries + from + row] =
            softmax_codes(scores + row * keys, more + head * keys, keys, times, largest,
                          powers.data(), p + row * keys);
      product(result, codes, v.select(0, head));
    }
  });
  return {output, totals};
}

}  // namespace
