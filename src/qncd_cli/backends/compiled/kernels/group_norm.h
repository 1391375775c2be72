// Quantization of a convolution's input, and before it, where there is one, group normalization
// with what belongs to it: two passes over memory, the second of which finds an image in the cache
// if it fits there. Sums are taken over pieces of fixed size and added up in a fixed order, so that
// no result depends on the number of threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "quantizer.h"

namespace {

constexpr int64_t PIECE = 256;  // positions of an image that are summed up together

// sums_of for the first BLOCK vectors of channels, whose sums stay in registers.
template <typename T, int64_t BLOCK>
void sums_of_block(const T* x,
                   int64_t channels,
                   int64_t left,
                   int64_t from,
                   int64_t to,
                   float* sum,
                   float* square) {
  Vector first[BLOCK], a[BLOCK], b[BLOCK];
  Mask mask[BLOCK];
  for (int64_t i = 0; i < BLOCK; ++i) {
    mask[i] = mask_of(left - i * WIDTH);
    first[i] = load(x + i * WIDTH, mask[i]);
    a[i] = b[i] = filled(0.0f);
  }
  for (int64_t p = from; p < to; ++p) {
    for (int64_t i = 0; i < BLOCK; ++i) {
      const Vector d = load(x + p * channels + i * WIDTH, mask[i]) - first[i];
      a[i] = a[i] + d;
      b[i] = product_and(d, d, b[i]);
    }
  }
  for (int64_t i = 0; i < BLOCK; ++i) {
    store(sum + i * WIDTH, a[i], mask[i]);
    store(square + i * WIDTH, b[i], mask[i]);
  }
}

// Sums of (x - first) and of its squares over positions [from, to), for the channels of one part.
// x: [positions, channels] of one image; first: its first position.
template <typename T>
void sums_of(const T* x, int64_t channels, int64_t from, int64_t to, float* sum, float* square) {
  for (int64_t c = 0; c < channels;) {
    const int64_t left = (channels - c + WIDTH - 1) / WIDTH;
    auto* block = left >= 4  ? sums_of_block<T, 4>
                  : left > 1 ? sums_of_block<T, 2>
                             : sums_of_block<T, 1>;
    block(x + c, channels, channels - c, from, to, sum + c, square + c);
    c += WIDTH * (left >= 4 ? 4 : left > 1 ? 2 : 1);
  }
}

// y = x factor + offset per channel, SiLU, smoothing, codes; `low` and `high` have `all` channels.
template <typename T, bool SILU>
void codes_of(const T* x,
              int64_t channels,
              int64_t all,
              int64_t from,
              int64_t to,
              const float* factor,
              const float* offset,
              const Quantizer q,  // a copy: nothing that is written can be part of it
              uint8_t* low,
              uint8_t* high) {
  for (int64_t p = from; p < to; ++p) {
    for (int64_t c = 0; c < channels; c += WIDTH) {
      const Mask mask = mask_of(channels - c);
      const Vector value = load(x + p * channels + c, mask);
      Vector y = product_and(value, load(factor + c, mask), load(offset + c, mask));
      if (SILU) y = silu(y);
      q.write(y, c, mask, low + p * all + c, high + p * all + c);
    }
  }
}

struct Part {
  const Tensor tensor;
  int64_t channels, begin;
};

// Parameters float32, null where there is none: weight, bias [C]; embedding, multiplier, addend
// [N, C]. Without a weight there is no norm, and none of the others.
struct GroupNorm {
  std::vector<Part> parts;
  int64_t images, positions, channels, groups, pieces;
  double eps;
  bool silu;
  const float *weight, *bias, *embedding, *multiplier, *addend;
};

// f(where the part of an image begins), as float32 or bfloat16.
template <typename F>
void with_pointer(const Part& part, int64_t image, int64_t positions, F f) {
  const int64_t start = image * positions * part.channels;
  if (part.tensor.scalar_type() == at::kFloat)
    f(part.tensor.const_data_ptr<float>() + start);
  else
    f(part.tensor.const_data_ptr<at::BFloat16>() + start);
}

// Sums of one piece of an image: sums [2, C].
void add_up(const GroupNorm& norm, int64_t image, int64_t piece, float* sums) {
  if (!norm.weight) return;
  const int64_t from = piece * PIECE, to = std::min(norm.positions, from + PIECE);
  for (const Part& part : norm.parts)
    with_pointer(part, image, norm.positions, [&](auto* x) {
      sums_of(x, part.channels, from, to, sums + part.begin, sums + norm.channels + part.begin);
    });
}

float at_channel(const float* of_images, int64_t place, float otherwise) {
  return of_images ? of_images[place] : otherwise;
}

// From sums [pieces, 2, C] of an image to factor and offset, each [C]: x factor + offset is
// GN(x + embedding) * multiplier + addend (GN: Wu & He, arXiv 1803.08494, eq. 1 to 6).
void factors_from_sums(const GroupNorm& norm,
                       int64_t image,
                       const float* sums,
                       float* factor,
                       float* offset) {
  const int64_t channels = norm.channels, start_of = image * channels;
  if (!norm.weight) {
    std::fill(factor, factor + channels, 1.0f);
    std::fill(offset, offset + channels, 0.0f);
    return;
  }
  const int64_t width = channels / norm.groups;
  std::vector<double> mean(channels), within(channels);
  for (const Part& part : norm.parts)
    with_pointer(part, image, norm.positions, [&](auto* first) {
      for (int64_t k = 0; k < part.channels; ++k) {
        const int64_t c = part.begin + k;
        double sum = 0, square = 0;
        for (int64_t piece = 0; piece < norm.pieces; ++piece) {
          sum += sums[2 * piece * channels + c];
          square += sums[(2 * piece + 1) * channels + c];
        }
        sum /= norm.positions;
        within[c] = square / norm.positions - sum * sum;
        mean[c] = sum + static_cast<float>(first[k]) + at_channel(norm.embedding, start_of + c, 0);
      }
    });
  for (int64_t start = 0; start < channels; start += width) {
    double middle = 0, variance = 0;
    for (int64_t c = start; c < start + width; ++c) middle += mean[c];
    middle /= width;
    for (int64_t c = start; c < start + width; ++c)
      variance += within[c] + (mean[c] - middle) * (mean[c] - middle);
    const double root = 1 / std::sqrt(std::max(0.0, variance / width) + norm.eps);
    for (int64_t c = start; c < start + width; ++c) {
      const double f = root * norm.weight[c];
      const double o = norm.bias[c] + (at_channel(norm.embedding, start_of + c, 0) - middle) * f;
      const float multiplier = at_channel(norm.multiplier, start_of + c, 1);
      factor[c] = static_cast<float>(f * multiplier);
      offset[c] = static_cast<float>(o * multiplier + at_channel(norm.addend, start_of + c, 0));
    }
  }
}

// Codes of one piece of an image; low, high: of all images.
void write_codes(const GroupNorm& norm,
                 int64_t image,
                 int64_t piece,
                 const float* factor,
                 const float* offset,
                 const Quantizer& q,
                 uint8_t* low,
                 uint8_t* high) {
  const int64_t from = piece * PIECE, to = std::min(norm.positions, from + PIECE);
  const int64_t start = image * norm.positions * norm.channels;
  for (const Part& part : norm.parts)
    with_pointer(part, image, norm.positions, [&](auto* x) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
      Quantizer own = q;
      if (own.smoothing) own.smoothing += part.begin;
      if (own.shift) own.shift += part.begin;
      auto* write = norm.silu ? codes_of<T, true> : codes_of<T, false>;
      write(x, part.channels, norm.channels, from, to, factor + part.begin, offset + part.begin,
            own, low + start + part.begin, high + start + part.begin);
    });
}

// Everything, by as many threads as torch has.
void normalize_and_quantize(const GroupNorm& norm, const Quantizer& q, uint8_t* low, uint8_t* high) {
  const int64_t pieces = norm.pieces, channels = norm.channels, images = norm.images;
  const int64_t threads = at::get_num_threads();
  if (images >= 8 * threads || images % threads == 0) {
    // an image at a time, while it is in the cache
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(2 * pieces * channels), factor(channels), offset(channels);
      for (int64_t image = begin; image < end; ++image) {
        for (int64_t k = 0; k < pieces; ++k) add_up(norm, image, k, &sums[2 * k * channels]);
        factors_from_sums(norm, image, sums.data(), factor.data(), offset.data());
        for (int64_t k = 0; k < pieces; ++k)
          write_codes(norm, image, k, factor.data(), offset.data(), q, low, high);
      }
    });
    return;
  }
  std::vector<float> sums(2 * images * pieces * channels);
  std::vector<float> factor(images * channels), offset(images * channels);
  at::parallel_for(0, images * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      add_up(norm, k / pieces, k % pieces, &sums[2 * k * channels]);
  });
  for (int64_t image = 0; image < images; ++image)
    factors_from_sums(norm, image, &sums[2 * image * pieces * channels],
                      &factor[image * channels], &offset[image * channels]);
  at::parallel_for(0, images * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t image = k / pieces;
      write_codes(norm, image, k % pieces, &factor[image * channels], &offset[image * channels], q,
                  low, high);
    }
  });
}

// parts: [N, C_i, H, W] each, float32 or bfloat16, of which x [N, C, H, W] consists; weight, bias,
// smoothing, shift: [C]; embedding, multiplier, addend: the same at every position, N x C numbers;
// scale, zero_point: float32, one number each. Codes of
//   (silu(GN(x + embedding) * multiplier + addend) - shift) / smoothing
// uint8 [N, C, H, W] in channels_last, low and high bytes, the latter empty up to 8 bits. Whatever
// is missing is left out; without a weight there is no norm, and nothing before it.
std::tuple<Tensor, Tensor> image_codes(const std::vector<Tensor>& given,
                                       const OptionalTensor& embedding,
                                       const OptionalTensor& weight,
                                       const OptionalTensor& bias,
                                       const OptionalTensor& multiplier,
                                       const OptionalTensor& addend,
                                       int64_t groups,
                                       double eps,
                                       bool silu,
                                       const OptionalTensor& smoothing,
                                       const OptionalTensor& shift,
                                       const Tensor& scale,
                                       const Tensor& zero_point,
                                       int64_t bits) {
  const int64_t positions = given[0].size(2) * given[0].size(3);
  GroupNorm norm{{}, given[0].size(0), positions, 0, groups, 0, eps, silu};
  for (const Tensor& part : given) {
    norm.parts.push_back(
        {part.contiguous(at::MemoryFormat::ChannelsLast), part.size(1), norm.channels});
    norm.channels += part.size(1);
  }
  norm.pieces = (norm.positions + PIECE - 1) / PIECE;
  const Floats w(weight), b(bias), e(embedding), m(multiplier), a(addend), s(smoothing), d(shift);
  norm.weight = w;
  norm.bias = b;
  norm.embedding = e;
  norm.multiplier = m;
  norm.addend = a;
  const Quantizer q(s, d, scale, zero_point, bits);
  const std::vector<int64_t> shape{norm.images, norm.channels, given[0].size(2), given[0].size(3)};
  auto [low, high] = empty_codes(shape, bits, at::MemoryFormat::ChannelsLast);
  normalize_and_quantize(norm, q, low.mutable_data_ptr<uint8_t>(), high.mutable_data_ptr<uint8_t>());
  return {low, high};
}

}  // namespace
