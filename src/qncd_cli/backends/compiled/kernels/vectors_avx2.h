// Vectors of 8 numbers, for AVX2 with FMA; what they do is said in vectors_avx512.h.

#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t WIDTH = 8;
using Vector = __m256;
using Integers = __m256i;

struct Mask {
  __m256i lanes;  // all bits of those that are set
  int64_t count;  // of the first ones, which are set
};

Mask mask_of(int64_t left) {
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int64_t count = left < WIDTH ? left : WIDTH;
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), places), count};
}

Vector filled(float x) {
  return _mm256_set1_ps(x);
}

Integers filled(int32_t x) {
  return _mm256_set1_epi32(x);
}

Vector load(const float* from, Mask mask) {
  return mask.count == WIDTH ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, mask.lanes);
}

Vector load(const float* from, Mask mask, Vector otherwise) {
  return _mm256_blendv_ps(otherwise, load(from, mask), _mm256_castsi256_ps(mask.lanes));
}

Vector load(const at::BFloat16* from, Mask mask) {
  __m128i bits = _mm_setzero_si128();
  if (mask.count == WIDTH)
    bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  else
    std::memcpy(&bits, from, mask.count * sizeof(*from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

Integers load(const int32_t* from, Mask mask) {
  return _mm256_maskload_epi32(from, mask.lanes);
}

void store(float* to, Vector x, Mask mask) {
  if (mask.count == WIDTH)
    _mm256_storeu_ps(to, x);
  else
    _mm256_maskstore_ps(to, mask.lanes, x);
}

template <typename T>
void store_bytes(T* to, Integers x, Mask mask) {
  const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(255));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  if (mask.count == WIDTH)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
  else
    std::memcpy(to, &bytes, mask.count);
}

Vector product_and(Vector a, Vector b, Vector c) {
  return _mm256_fmadd_ps(a, b, c);
}

Vector less_product(Vector a, Vector b, Vector c) {
  return _mm256_fnmadd_ps(a, b, c);
}

Vector smaller(Vector a, Vector b) {
  return _mm256_min_ps(a, b);
}

Vector larger(Vector a, Vector b) {
  return _mm256_max_ps(a, b);
}

Vector absolute(Vector x) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

Vector where_positive(Vector x, Vector a, Vector b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
}

Vector rounded(Vector x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// By two powers of two, each of which is a number: below 2^-252 nothing is left of x.
Vector scaled(Vector x, Vector n) {
  n = _mm256_min_ps(_mm256_max_ps(n, filled(-252.0f)), filled(254.0f));
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
  return x * _mm256_castsi256_ps(first) * _mm256_castsi256_ps(second);
}

// A division: what is approximated here has 12 bits, which takes two steps.
Vector reciprocal(Vector x) {
  return _mm256_div_ps(filled(1.0f), x);
}

Integers to_integers(Vector x) {
  return _mm256_cvtps_epi32(x);
}

Vector to_floats(Integers x) {
  return _mm256_cvtepi32_ps(x);
}

Integers sum(Integers a, Integers b) {
  return _mm256_add_epi32(a, b);
}

Integers difference(Integers a, Integers b) {
  return _mm256_sub_epi32(a, b);
}

Integers second_bytes(Integers x) {
  return _mm256_srli_epi32(x, 8);
}

Vector sum_where(Mask mask, Vector of, Vector more) {
  return of + _mm256_and_ps(more, _mm256_castsi256_ps(mask.lanes));
}

Integers sum_where(Mask mask, Integers of, Integers more) {
  return _mm256_add_epi32(of, _mm256_and_si256(more, mask.lanes));
}

Vector larger_where(Mask mask, Vector of, Vector more) {
  return _mm256_max_ps(of, _mm256_blendv_ps(of, more, _mm256_castsi256_ps(mask.lanes)));
}

Integers larger_where(Mask mask, Integers of, Integers more) {
  return _mm256_max_epi32(of, _mm256_blendv_epi8(of, more, mask.lanes));
}

float sum_of(Vector x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

int32_t sum_of(Integers x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0b10110001)));
}

float largest_of(Vector x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

int32_t largest_of(Integers x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0b01001110));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0b10110001)));
}

}  // namespace
