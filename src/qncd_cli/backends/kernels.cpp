// The statistics of group normalization (Wu & He, arXiv 1803.08494), per channel.
//
// The compiler that makes a graph reads the few channels of a group with masked vectors. Here all
// channels of a position are summed side by side, in float32 over ROWS positions and in double from
// there on, relative to the first position, so that a mean far from zero costs no digits. What
// belongs to one sample depends neither on its batch nor on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t ROWS = 32;

inline float load(const float *x) { return *x; }

inline float load(const uint16_t *x) {  // bfloat16
  uint32_t bits = static_cast<uint32_t>(*x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// x [samples, rows, channels]; partial [samples, chunks, 2, channels]; shift, factor [samples,
// channels], so that the normalized x is (x - shift) factor + bias.
template <typename T>
void group_norm(const T *x, int64_t samples, int64_t rows, int64_t channels, int64_t groups,
                double eps, const float *weight, float *partial, float *shift, float *factor) {
  const int64_t chunks = (rows + ROWS - 1) / ROWS, width = channels / groups;
#pragma omp parallel for collapse(2)
  for (int64_t i = 0; i < samples; i++)
    for (int64_t k = 0; k < chunks; k++) {
      float *sum = partial + (i * chunks + k) * 2 * channels, *square = sum + channels;
      const T *first = x + i * rows * channels;
      std::memset(sum, 0, 2 * channels * sizeof(float));
      const int64_t end = (k + 1) * ROWS < rows ? (k + 1) * ROWS : rows;
      for (int64_t r = k * ROWS; r < end; r++)
        for (int64_t j = 0; j < channels; j++) {
          const float difference = load(first + r * channels + j) - load(first + j);
          sum[j] += difference;
          square[j] += difference * difference;
        }
    }
#pragma omp parallel for collapse(2)
  for (int64_t i = 0; i < samples; i++)
    for (int64_t g = 0; g < groups; g++) {
      const T *first = x + i * rows * channels;
      std::vector<double> means(width);
      double mean = 0, variance = 0;
      for (int64_t j = 0; j < width; j++) {
        const int64_t channel = g * width + j;
        double sum = 0, square = 0;
        for (int64_t k = 0; k < chunks; k++) {
          const float *part = partial + (i * chunks + k) * 2 * channels + channel;
          sum += part[0];
          square += part[channels];
        }
        const double offset = sum / rows;
        means[j] = load(first + channel) + offset;
        mean += means[j] / width;
        variance += (square / rows - offset * offset) / width;
      }
      for (int64_t j = 0; j < width; j++)
        variance += (means[j] - mean) * (means[j] - mean) / width;
      const double scale = 1 / std::sqrt((variance > 0 ? variance : 0) + eps);
      for (int64_t j = g * width; j < (g + 1) * width; j++) {
        shift[i * channels + j] = static_cast<float>(mean);
        factor[i * channels + j] = static_cast<float>(scale * weight[j]);
      }
    }
}

}  // namespace

extern "C" {

void group_norm_float32(const float *x, int64_t samples, int64_t rows, int64_t channels,
                        int64_t groups, double eps, const float *weight, float *partial,
                        float *shift, float *factor) {
  group_norm(x, samples, rows, channels, groups, eps, weight, partial, shift, factor);
}

void group_norm_bfloat16(const uint16_t *x, int64_t samples, int64_t rows, int64_t channels,
                         int64_t groups, double eps, const float *weight, float *partial,
                         float *shift, float *factor) {
  group_norm(x, samples, rows, channels, groups, eps, weight, partial, shift, factor);
}
}
