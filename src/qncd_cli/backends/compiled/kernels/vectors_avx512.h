// Vectors of 16 numbers, for AVX-512.

#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t WIDTH = 16;
using Vector = __m512;     // float32
using Integers = __m512i;  // int32
using Mask = __mmask16;

Mask mask_of(int64_t left) {
  return left >= WIDTH ? Mask(0xffff) : Mask((1 << left) - 1);
}

Vector filled(float x) {
  return _mm512_set1_ps(x);
}

Integers filled(int32_t x) {
  return _mm512_set1_epi32(x);
}

Vector load(const float* from, Mask mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}

Vector load(const float* from, Mask mask, Vector otherwise) {
  return _mm512_mask_loadu_ps(otherwise, mask, from);
}

Vector load(const at::BFloat16* from, Mask mask) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

Integers load(const int32_t* from, Mask mask) {
  return _mm512_maskz_loadu_epi32(mask, from);
}

// Masked only where it has to be: some processors take many times as long for that.
void store(float* to, Vector x, Mask mask) {
  if (mask == 0xffff)
    _mm512_storeu_ps(to, x);
  else
    _mm512_mask_storeu_ps(to, mask, x);
}

// The lowest byte of each.
template <typename T>
void store_bytes(T* to, Integers x, Mask mask) {
  const __m128i bytes = _mm512_cvtepi32_epi8(x);
  if (mask == 0xffff)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  else
    _mm_mask_storeu_epi8(to, mask, bytes);
}

// a b + c and c - a b, rounded once.
Vector product_and(Vector a, Vector b, Vector c) {
  return _mm512_fmadd_ps(a, b, c);
}

Vector less_product(Vector a, Vector b, Vector c) {
  return _mm512_fnmadd_ps(a, b, c);
}

// The second where the first is no number.
Vector smaller(Vector a, Vector b) {
  return _mm512_min_ps(a, b);
}

Vector larger(Vector a, Vector b) {
  return _mm512_max_ps(a, b);
}

Vector absolute(Vector x) {
  return _mm512_abs_ps(x);
}

// a where x > 0, else b.
Vector where_positive(Vector x, Vector a, Vector b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), b, a);
}

Vector rounded(Vector x) {
  return _mm512_roundscale_ps(x, 0);
}

// x 2^n for whole n.
Vector scaled(Vector x, Vector n) {
  return _mm512_scalef_ps(x, n);
}

// 1 / x within about 2^-23 of itself, for x of 1 to 2^126: an approximation of 14 bits and a step of
// Newton's method, in a fraction of a division's time.
Vector reciprocal(Vector x) {
  const Vector r = _mm512_rcp14_ps(x);
  return product_and(less_product(x, r, filled(1.0f)), r, r);
}

Integers to_integers(Vector x) {
  return _mm512_cvtps_epi32(x);
}

Vector to_floats(Integers x) {
  return _mm512_cvtepi32_ps(x);
}

Integers sum(Integers a, Integers b) {
  return _mm512_add_epi32(a, b);
}

Integers difference(Integers a, Integers b) {
  return _mm512_sub_epi32(a, b);
}

Integers second_bytes(Integers x) {
  return _mm512_srli_epi32(x, 8);
}

// `of` and `more` together where the mask is set, else `of`.
Vector sum_where(Mask mask, Vector of, Vector more) {
  return _mm512_mask_add_ps(of, mask, of, more);
}

Integers sum_where(Mask mask, Integers of, Integers more) {
  return _mm512_mask_add_epi32(of, mask, of, more);
}

Vector larger_where(Mask mask, Vector of, Vector more) {
  return _mm512_mask_max_ps(of, mask, of, more);
}

Integers larger_where(Mask mask, Integers of, Integers more) {
  return _mm512_mask_max_epi32(of, mask, of, more);
}

// Of all numbers of a vector.
float sum_of(Vector x) {
  return _mm512_reduce_add_ps(x);
}

int32_t sum_of(Integers x) {
  return _mm512_reduce_add_epi32(x);
}

float largest_of(Vector x) {
  return _mm512_reduce_max_ps(x);
}

int32_t largest_of(Integers x) {
  return _mm512_reduce_max_epi32(x);
}

}  // namespace
