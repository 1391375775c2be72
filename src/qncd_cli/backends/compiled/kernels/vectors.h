// Vectors of 16 numbers in float32, for AVX-512, which the integer kernels need anyway.

#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t WIDTH = 16;

__mmask16 mask_of(int64_t left) {
  return left >= WIDTH ? __mmask16(0xffff) : __mmask16((1 << left) - 1);
}

__m512 load(const float* from, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}

__m512 load(const at::BFloat16* from, __mmask16 mask) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Masked only where it has to be: some processors take many times as long for that.
template <typename T>
void store(T* to, __m128i bytes, __mmask16 mask) {
  if (mask == 0xffff)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  else
    _mm_mask_storeu_epi8(to, mask, bytes);
}

void store(float* to, __m512 numbers, __mmask16 mask) {
  if (mask == 0xffff)
    _mm512_storeu_ps(to, numbers);
  else
    _mm512_mask_storeu_ps(to, mask, numbers);
}

// e^x for finite x, within about (4 + |x|) 2^-24 of itself: 2^n 2^r with n + r = x / ln 2, 2^r by
// the Taylor series of e^(r ln 2) up to degree 6 (|r| <= 1/2: what is left out is about 2^-23).
__m512 exponential(__m512 x) {
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, 0), r = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// 1 / x within about 2^-23 of itself, for x of 1 to 2^126: an approximation of 14 bits and a step of
// Newton's method, in a fraction of a division's time.
__m512 reciprocal(__m512 x) {
  const __m512 r = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(x, r, _mm512_set1_ps(1.0f)), r, r);
}

// x / (1 + e^-x). Below -87 the power would be infinite; what is left of x there is 0 all the same.
__m512 silu(__m512 x) {
  const __m512 negative = _mm512_sub_ps(_mm512_setzero_ps(), x);
  const __m512 e = exponential(_mm512_min_ps(negative, _mm512_set1_ps(87.0f)));
  return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(e, _mm512_set1_ps(1.0f))));
}

// x Phi(x), with the error function of Abramowitz and Stegun, 7.1.26 (off by 1.5e-7 at most).
__m512 gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), z = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f));
  const __m512 t =
      reciprocal(_mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), _mm512_abs_ps(z), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z)));
  const __m512 half_tail =
      _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(e, _mm512_set1_ps(0.5f)));
  const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(half_tail, positive, one, half_tail));
}

}  // namespace
