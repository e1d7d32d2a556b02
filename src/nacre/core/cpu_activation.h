// Activations and their gradients: the functions y(x), and g dy/dx, which is told x, or as well y for ReLU.
#pragma once

#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_primitives.h"

#include <array>

namespace nacre {

constexpr double sqrt_half = 0.70710678118654752440, log2_e = 1.44269504088896340736;

// The probability that a standard normal value lies below x. In float it is 2^q(|x|) below 0, with the polynomial q
// that makes the error of the probability least: at most 1e-7, and less the smaller the probability is.
template <class A>
inline Vector<A> normal_probability(Vector<A> x) {
  if constexpr (sizeof(A) == 8) {
    return A(0.5) * (1 + erf<A>(x * A(sqrt_half)));
  } else {
    constexpr std::array<A, 9> q = {-1.0f,           -1.151106f,      -0.459198296f,   -0.0525336117f, 0.00712686498f,
                                    -0.000191703541f, -0.000161293836f, 3.37378151e-05f, -2.33494893e-06f};
    const Vector<A> tail = exp2_of_negative<A>(polynomial<A>(absolute<A>(x), q));
    return x > 0 ? 1 - tail : tail;
  }
}

// exp(-x^2 / 2) / sqrt(2 pi), as a power of 2.
template <class A>
inline Vector<A> normal_density(Vector<A> x) {
  constexpr A log2_of_density_at_0 = A(-1.32574806473615990417);
  return exp2_of_negative<A>(multiply_add<A>(x * x, every<A>(A(-0.5 * log2_e)), every<A>(log2_of_density_at_0)));
}

struct Gelu {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x * normal_probability<A>(x);
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> x) {
    return g * multiply_add<A>(x, normal_density<A>(x), normal_probability<A>(x));
  }
};

// The sigmoid s of x and 1 - s, neither a difference of nearly equal numbers, from power = exp(-|x|).
template <class A>
struct Sigmoids {
  Vector<A> s, one_minus_s;
};

template <class A>
inline Sigmoids<A> sigmoids(Vector<A> x, Vector<A> power) {
  const Vector<A> larger = 1 / (1 + power), smaller = power * larger;
  return {x < 0 ? smaller : larger, x < 0 ? larger : smaller};
}

// (1 + tanh(u)) / 2 is the sigmoid of 2 u, and exp(-|2 u|) is 2^-|v|, where
//     v = x (inner + outer x^2)        d(2 u)/dx = ln(2) dv/dx
struct GeluTanh {
  static constexpr double inner = 2 * 0.79788456080286535588 * log2_e, outer = 0.044715 * inner;

  template <class A>
  static Sigmoids<A> gates(Vector<A> x) {
    const Vector<A> v = x * multiply_add<A>(x * x, every<A>(A(outer)), every<A>(A(inner)));
    return sigmoids<A>(v, exp2_of_negative<A>(-absolute<A>(v)));
  }
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x * gates<A>(x).s;
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> x) {
    const auto [s, one_minus_s] = gates<A>(x);
    const Vector<A> slope = multiply_add<A>(x * x, every<A>(A(3 * outer / log2_e)), every<A>(A(inner / log2_e)));
    return g * (s + x * slope * (s * one_minus_s));
  }
};

struct Relu {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x <= 0 ? Vector<A>{} : x;  // so asked, NaN stays NaN
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> y) {
    return y <= 0 ? Vector<A>{} : g;
  }
};

struct Silu {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x * sigmoid<A>(x);
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> x) {
    const auto [s, one_minus_s] = sigmoids<A>(x, exp<A>(-absolute<A>(x)));
    return g * s * (1 + x * one_minus_s);
  }
};

}  // namespace nacre
