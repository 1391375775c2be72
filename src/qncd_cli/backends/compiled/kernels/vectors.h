// Vectors of WIDTH numbers and functions of them, on what this CPU has.

#pragma once

#ifdef __AVX512F__
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif

namespace {

// e^x for finite x, within about (4 + |x|) 2^-24 of itself: 2^n 2^r with n + r = x / ln 2, 2^r by
// the Taylor series of e^(r ln 2) up to degree 6 (|r| <= 1/2: what is left out is about 2^-23).
Vector exponential(Vector x) {
  const Vector t = x * filled(1.44269504f), n = rounded(t), r = t - n;
  Vector p = filled(1.5403530e-4f);
  p = product_and(p, r, filled(1.3333558e-3f));
  p = product_and(p, r, filled(9.6181291e-3f));
  p = product_and(p, r, filled(5.5504109e-2f));
  p = product_and(p, r, filled(2.4022651e-1f));
  p = product_and(p, r, filled(6.9314718e-1f));
  p = product_and(p, r, filled(1.0f));
  return scaled(p, n);
}

// x / (1 + e^-x). Below -87 the power would be infinite; what is left of x there is 0 all the same.
Vector silu(Vector x) {
  const Vector e = exponential(smaller(filled(0.0f) - x, filled(87.0f)));
  return x * reciprocal(e + filled(1.0f));
}

// x Phi(x), with the error function of Abramowitz and Stegun, 7.1.26 (off by 1.5e-7 at most).
Vector gelu(Vector x) {
  const Vector one = filled(1.0f), z = x * filled(0.70710678f);
  const Vector t = reciprocal(product_and(filled(0.3275911f), absolute(z), one));
  Vector p = filled(1.061405429f);
  p = product_and(p, t, filled(-1.453152027f));
  p = product_and(p, t, filled(1.421413741f));
  p = product_and(p, t, filled(-0.284496736f));
  p = product_and(p, t, filled(0.254829592f));
  const Vector e = exponential(filled(0.0f) - z * z);
  const Vector half_tail = (p * t) * (e * filled(0.5f));
  return x * where_positive(x, one - half_tail, half_tail);
}

}  // namespace
