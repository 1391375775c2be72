// Integer products: oneDNN's operators, called without Python in between.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/repeat.h>

#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

#include "quantizer.h"

namespace {

using torch::jit::Stack;

// What the products of one layer need: weights in oneDNN's order and their scales, one pair or, for
// weights of two bytes, two. writes_bfloat16: whether the operator does so in good time. upsampled:
// the weights are those of a 3x3 convolution of an image of twice the size, see `interleaved`.
// rows: of padding that an image's codes get above and below here, which is not in `padding`.
struct Layer {
  bool is_conv, upsampled;
  std::vector<Tensor> weights, weight_scales;
  Tensor weight_zero_point;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups, rows;
  bool writes_bfloat16;
};

std::unordered_map<std::string, Layer>& layers() {
  static std::unordered_map<std::string, Layer> kept;
  return kept;
}

std::mutex& guard() {
  static std::mutex mutex;
  return mutex;
}

void keep(std::string key,
          bool is_conv,
          bool upsampled,
          std::vector<Tensor> weights,
          std::vector<Tensor> weight_scales,
          Tensor weight_zero_point,
          std::vector<int64_t> stride,
          std::vector<int64_t> padding,
          std::vector<int64_t> dilation,
          int64_t groups,
          int64_t rows,
          bool writes_bfloat16) {
  Layer layer{is_conv, upsampled, weights, weight_scales, weight_zero_point, stride,
              padding, dilation,  groups,  rows,          writes_bfloat16};
  std::lock_guard<std::mutex> lock(guard());
  std::swap(layers()[key], layer);  // what was there ends after the lock, as below
}

void forget(std::string key) {
  decltype(layers().extract(key)) gone;  // outlives the lock: a tensor's end may run the collector
  std::lock_guard<std::mutex> lock(guard());
  gone = layers().extract(key);
}

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// A copy, which is a handful of references; asked of Python once, which packs the weights.
Layer layer_of(const std::string& key, const Tensor& codes, at::ScalarType dtype, bool upsampled) {
  {
    std::lock_guard<std::mutex> lock(guard());
    auto found = layers().find(key);
    if (found != layers().end()) return found->second;
  }
  static const auto prepare = find("qncd::prepare");
  Stack stack{codes, key, static_cast<int64_t>(dtype), upsampled};
  prepare.callBoxed(stack);
  std::lock_guard<std::mutex> lock(guard());
  return layers().at(key);
}

struct Operands {
  Tensor codes;
  double scale;
  int64_t zero_point;
  Tensor weight, weight_scale;
};

// One product of bytes.
Tensor pass(const Layer& layer,
            const Operands& x,
            const OptionalTensor& bias,
            at::ScalarType dtype) {
  static const auto conv = find("onednn::qconv_pointwise");
  static const auto linear = find("onednn::qlinear_pointwise");
  const c10::List<std::optional<at::Scalar>> none;
  Tensor codes = x.codes;
  if (layer.rows) codes = at::constant_pad_nd(codes, {0, 0, layer.rows, layer.rows}, x.zero_point);
  Stack stack{codes, x.scale, x.zero_point, x.weight, x.weight_scale, layer.weight_zero_point};
  stack.emplace_back(bias);
  if (layer.is_conv) {
    for (const auto* numbers : {&layer.stride, &layer.padding, &layer.dilation})
      stack.emplace_back(*numbers);
    stack.emplace_back(layer.groups);
  }
  stack.emplace_back(1.0);
  stack.emplace_back(int64_t(0));
  stack.emplace_back(static_cast<int64_t>(dtype));
  stack.emplace_back(std::string("none"));
  stack.emplace_back(none);
  stack.emplace_back(std::string(""));
  (layer.is_conv ? conv : linear).callBoxed(stack);
  return stack.front().toTensor();
}

// x [N, 4 C, H + 1, W + 1] -> [N, C, 2 H, 2 W], both channels_last: a 3x3 convolution of an image
// whose pixels were doubled in either direction is, for each of the four places within such a
// pixel, a convolution of the image itself with a 2x2 kernel. Output (2 i + a, 2 j + b) is x's part
// 2 a + b at (i + a, j + b).
Tensor interleaved(const Tensor& x) {
  const int64_t channels = x.size(1) / 4, height = x.size(2) - 1, width = x.size(3) - 1;
  Tensor output = at::empty({x.size(0), channels, 2 * height, 2 * width},
                            x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const int64_t bytes = channels * x.element_size();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(output.mutable_data_ptr());
  at::parallel_for(0, x.size(0) * 2 * height, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / (2 * height), i = row % (2 * height) / 2, a = row % 2;
      for (int64_t column = 0; column < 2 * width; ++column) {
        const int64_t j = column / 2, b = column % 2;
        const int64_t place = (image * (height + 1) + i + a) * (width + 1) + j + b;
        std::memcpy(to + (row * 2 * width + column) * bytes, from + (4 * place + 2 * a + b) * bytes,
                    bytes);
      }
    }
  });
  return output;
}

// low, high: codes uint8 of one or two bytes, [N, C, ...] or [..., C]; scale, zero_point: float32,
// one number each. Sums of several passes are float32, rounded to dtype once. upsampled: the
// layer's input is the image of the codes with its pixels doubled.
Tensor multiply(const Tensor& low,
                const OptionalTensor& high,
                const Tensor& scale,
                const Tensor& zero_point,
                const OptionalTensor& bias,
                std::string key,
                at::ScalarType dtype,
                bool upsampled) {
  const Layer layer = layer_of(key, low, dtype, upsampled);
  const double s = number(scale);
  const auto z = static_cast<int64_t>(number(zero_point));
  const auto order = layer.is_conv ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  std::vector<std::tuple<Tensor, double, int64_t>> bytes{{low.contiguous(order), s, z & 255}};
  if (high) bytes.emplace_back(high->contiguous(order), 256 * s, z >> 8);
  std::vector<Operands> passes;
  for (const auto& [codes, byte_scale, byte_zero_point] : bytes)
    for (size_t i = 0; i < layer.weights.size(); ++i)
      passes.push_back(
          {codes, byte_scale, byte_zero_point, layer.weights[i], layer.weight_scales[i]});
  const bool rounds = passes.size() == 1 && layer.writes_bfloat16;
  const auto native = rounds ? dtype : at::kFloat;
  const OptionalTensor added = bias && upsampled ? bias->repeat(4) : bias;
  Tensor output = pass(layer, passes[0], added, native);
  for (size_t i = 1; i < passes.size(); ++i)
    output.add_(pass(layer, passes[i], std::nullopt, native));
  output = output.to(dtype);
  return upsampled ? interleaved(output) : output;
}

}  // namespace
