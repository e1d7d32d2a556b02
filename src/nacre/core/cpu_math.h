// Elementary functions of whole vectors, for the CPU kernels: exp, log, tanh, sigmoid and erf.
//
// Errors are stated in units in the last place (ulp) of the result, against exact mathematics; tests/test_cpu_math.py
// measures them. Infinities, NaN, signed zeros and subnormal numbers come out as in the C library.
#pragma once

#include "nacre/core/cpu_primitives.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace nacre {

// ---- what the functions are made of

template <class A>
using Integers = typename VectorOf<std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>, vector_bytes>::type;

// a b + c, rounded once where the processor can.
template <class A>
inline Vector<A> multiply_add(Vector<A> a, Vector<A> b, Vector<A> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Less zero, which leaves every value as it is, so that the compiler loads it into all lanes at once; plus zero is an
// addition, for the sake of -0.
template <class A>
inline Vector<A> every(A value) {
  return value - Vector<A>{};
}

// The smaller and the larger of x and a limit; NaN stays NaN, since the instructions then give their second operand.
// They are masked because gcc warns of the undefined values with which it writes the unmasked forms.
template <class A>
inline Vector<A> at_most(A limit, Vector<A> x) {
  const Vector<A> limits = every<A>(limit);
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm512_maskz_min_ps(0xffff, (__m512)limits, (__m512)x);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm512_maskz_min_pd(0xff, (__m512d)limits, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm256_min_ps((__m256)limits, (__m256)x);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm256_min_pd((__m256d)limits, (__m256d)x);
#else
  return limits < x ? limits : x;
#endif
}

template <class A>
inline Vector<A> at_least(A limit, Vector<A> x) {
  const Vector<A> limits = every<A>(limit);
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm512_maskz_max_ps(0xffff, (__m512)limits, (__m512)x);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm512_maskz_max_pd(0xff, (__m512d)limits, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm256_max_ps((__m256)limits, (__m256)x);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm256_max_pd((__m256d)limits, (__m256d)x);
#else
  return limits > x ? limits : x;
#endif
}

template <class A>
constexpr int mantissa_bits = std::numeric_limits<A>::digits - 1;

template <class A>
inline Integers<A> sign_bits() {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  return Integers<A>{} + (Bits(1) << (8 * sizeof(A) - 1));
}

template <class A>
inline Vector<A> absolute(Vector<A> x) {
  return (Vector<A>)((Integers<A>)x & ~sign_bits<A>());
}

// For magnitude >= 0.
template <class A>
inline Vector<A> with_sign_of(Vector<A> magnitude, Vector<A> x) {
  return (Vector<A>)((Integers<A>)magnitude | ((Integers<A>)x & sign_bits<A>()));
}

// 3/2 times the power of two above which numbers have no fraction: added to a small number it leaves the nearest
// integer in the lowest bits.
template <class A>
constexpr A rounder = A(1.5) * static_cast<A>(uint64_t(1) << mantissa_bits<A>);

// 2^n for integers n which are exponents of normal numbers.
template <class A>
inline Vector<A> power_of_two(Vector<A> n) {
  return (Vector<A>)(((Integers<A>)(n + rounder<A>) << mantissa_bits<A>) + (Integers<A>)every<A>(1));
}

// x 2^n, rounded once where it is subnormal, infinite where it is too large.
template <class A>
inline Vector<A> scale(Vector<A> x, Vector<A> n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)n);
#else
  const Vector<A> half = multiply_add<A>(n, every<A>(0.5), every<A>(rounder<A>)) - rounder<A>;
  return x * power_of_two<A>(half) * power_of_two<A>(n - half);
#endif
}

// The sum of coefficients[k] x^k.
template <class A, size_t N>
inline Vector<A> polynomial(Vector<A> x, const std::array<A, N>& coefficients) {
  Vector<A> sum = every<A>(coefficients[N - 1]);
  for (size_t k = N - 1; k-- > 0;) sum = multiply_add<A>(sum, x, every<A>(coefficients[k]));
  return sum;
}

// ln 2 in two parts, of which the first has so few digits that an exponent times it is exact.
template <class A>
constexpr A ln2_high = sizeof(A) == 4 ? A(0.693359375) : A(6.93147180369123816490e-01);
template <class A>
constexpr A ln2_low = sizeof(A) == 4 ? A(-2.12194440054690583e-4) : A(1.90821492927058770002e-10);

// ---- exponential functions

// exp(x) = 2^n (1 + m), with x = n ln 2 + r and m = exp(r) - 1.
template <class A>
struct Exponential {
  Vector<A> n, m;
};

// 1/2!, 1/3!, ...: exp(r) - 1 = r + r^2 (1/2! + r/3! + ...), and |r| <= ln(2) / 2.
template <class A>
constexpr auto inverse_factorials = [] {
  std::array<A, sizeof(A) == 4 ? 6 : 13> terms{};
  double factorial = 1;
  for (size_t k = 0; k < terms.size(); ++k) terms[k] = static_cast<A>(1 / (factorial *= static_cast<double>(k + 2)));
  return terms;
}();

// For |x| well below 2^20.
template <class A>
inline Exponential<A> exponential(Vector<A> x) {
  const Vector<A> n = multiply_add<A>(x, every<A>(A(1.44269504088896340736)), every<A>(rounder<A>)) - rounder<A>;
  const Vector<A> near = multiply_add<A>(n, every<A>(-ln2_high<A>), x);
  const Vector<A> r = multiply_add<A>(n, every<A>(-ln2_low<A>), near);
  return {n, multiply_add<A>(r * r, polynomial<A>(r, inverse_factorials<A>), r)};
}

// Error: at most 1.5 ulp.
template <class A>
inline Vector<A> exp(Vector<A> x) {
  constexpr bool single = sizeof(A) == 4;
  // beyond these bounds the result is 0 or infinity
  const auto [n, m] = exponential<A>(at_most<A>(single ? 89 : 710, at_least<A>(single ? -104 : -746, x)));
  return scale<A>(m + 1, n);
}

// ln(2)^k / k!: 2^f = exp(f ln 2), and |f| <= 1/2.
template <class A>
constexpr auto powers_of_ln2 = [] {
  std::array<A, sizeof(A) == 4 ? 8 : 14> terms{};
  double term = 1;
  for (size_t k = 0; k < terms.size(); term *= 0.69314718055994530942 / static_cast<double>(++k))
    terms[k] = static_cast<A>(term);
  return terms;
}();

// 2^x for x <= 0, cheaper than exp. Error: at most 1.5 ulp.
template <class A>
inline Vector<A> exp2_of_negative(Vector<A> x) {
  const Vector<A> near = at_least<A>(sizeof(A) == 4 ? -151 : -1076, x);  // there the result is 0
  const Vector<A> n = (near + rounder<A>) - rounder<A>;
  return scale<A>(polynomial<A>(near - n, powers_of_ln2<A>), n);
}

// (1 - exp(-2|x|)) / (1 + exp(-2|x|)), with the sign of x. Error: at most 2 ulp.
template <class A>
inline Vector<A> tanh(Vector<A> x) {
  const auto [n, m] = exponential<A>(-2 * at_most<A>(20, absolute<A>(x)));  // at 20 the result is 1
  const Vector<A> power = power_of_two<A>(n), rest = power * m;
  return with_sign_of<A>(((1 - power) - rest) / ((1 + power) + rest), x);
}

// 1 / (1 + exp(-x)). Error: at most 2.5 ulp.
template <class A>
inline Vector<A> sigmoid(Vector<A> x) {
  const Vector<A> power = exp<A>(-absolute<A>(x));
  return (x < 0 ? power : every<A>(1)) / (1 + power);
}

// ---- logarithm

// 2/3, 2/5, 2/7, ...: log((1 + s) / (1 - s)) = 2 s + s^3 (2/3 + 2/5 s^2 + ...), and |s| <= 0.172.
template <class A>
constexpr auto inverse_odds = [] {
  std::array<A, sizeof(A) == 4 ? 4 : 10> terms{};
  for (size_t k = 0; k < terms.size(); ++k) terms[k] = static_cast<A>(2 / static_cast<double>(2 * k + 3));
  return terms;
}();

// log(x) = n ln 2 + log(1 + f), with sqrt(1/2) <= 1 + f < sqrt(2). Error: at most 1.5 ulp.
template <class A>
inline Vector<A> log(Vector<A> x) {
  using Signed = typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, vector_bytes>::type;
  constexpr int digits = mantissa_bits<A>;
  const auto subnormal = x < std::numeric_limits<A>::min();
  const Vector<A> normal = subnormal ? x * static_cast<A>(uint64_t(1) << digits) : x;

  // counted from sqrt(1/2), the exponent's bits are n and the others those of 1 + f
  const Integers<A> start = (Integers<A>)every<A>(A(0.70710678118654752440));
  const Integers<A> distance = (Integers<A>)normal - start;
  const Integers<A> fraction = distance & (((Integers<A>{} + 1) << digits) - 1);
  const Vector<A> f = (Vector<A>)(fraction + start) - 1;
  const Vector<A> exponent = __builtin_convertvector((Signed)distance >> digits, Vector<A>);
  const Vector<A> n = subnormal ? exponent - A(digits) : exponent;

  // log(1 + f) = f - f^2/2 + s (f^2/2 + R), of which only the last term is rounded much
  const Vector<A> s = f / (2 + f), square = s * s, half = f * f * A(0.5);
  const Vector<A> rest = square * polynomial<A>(square, inverse_odds<A>);
  const Vector<A> small = multiply_add<A>(s, half + rest, n * ln2_low<A>);
  const Vector<A> result = multiply_add<A>(n, every<A>(ln2_high<A>), f - (half - small));

  const Vector<A> infinite = every<A>(std::numeric_limits<A>::infinity());
  const Vector<A> at_edge = x == 0 ? -infinite : x < 0 ? every<A>(std::numeric_limits<A>::quiet_NaN()) : x;
  return (x > 0) & (x < infinite) ? result : at_edge;
}

// ---- error function

// 1 - exp(-q(|x|)), with the sign of x, where q is the polynomial that makes the relative error least between 0 and 4.
// Error: at most 2 ulp; in double it is the C library's.
template <class A>
inline Vector<A> erf(Vector<A> x) {
  if constexpr (sizeof(A) == 8) {
    for (int64_t lane = 0; lane < lanes<A>; ++lane) x[lane] = std::erf(x[lane]);
    return x;
  } else {
    constexpr std::array<A, 9> q = {0.128379166f,    0.636619389f,   0.102777831f,    -0.0191530641f,  -0.000160396099f,
                                    0.00166702748f, -0.000632836891f, 0.000117641284f, -9.25626682e-06f};
    const Vector<A> size = at_most<A>(4, absolute<A>(x));  // at 4 the result is 1
    const auto [n, m] = exponential<A>(-multiply_add<A>(size, polynomial<A>(size, q), size));
    const Vector<A> power = power_of_two<A>(n);
    return with_sign_of<A>((1 - power) - power * m, x);
  }
}

}  // namespace nacre
