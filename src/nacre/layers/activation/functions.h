// The activations as functions of vectors: y(x), and the gradient g dy/dx, which is told x or y as formula.py has it.
#pragma once

#include "nacre/core/cpu_math.h"

#include <array>

namespace nacre {

constexpr double sqrt_half = 0.70710678118654752440, log2_e = 1.44269504088896340736;
constexpr double tanh_slope = 0.79788456080286535588, cubic = 0.044715;

// The probability that a standard normal value lies below x. In float its error is at most 1e-7, and where it is small it
// is small beside the probability as well: below 0 it is 2^q(|x|), with the polynomial q that makes the error least.
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

// (1 + tanh(u)) / 2 is the sigmoid of 2 u.
struct GeluTanh {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x * sigmoid<A>(A(2 * tanh_slope) * x * (1 + A(cubic) * x * x));
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> x) {
    const Vector<A> s = sigmoid<A>(A(2 * tanh_slope) * x * (1 + A(cubic) * x * x));
    const Vector<A> slope = A(2 * tanh_slope) * (1 + A(3 * cubic) * x * x);
    return g * (s + x * s * (1 - s) * slope);
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
    const Vector<A> s = sigmoid<A>(x);
    return g * s * (1 + x * (1 - s));
  }
};

struct Tanh {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return tanh<A>(x);
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> y) {
    return g * (1 - y * y);
  }
};

struct Sigmoid {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return sigmoid<A>(x);
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> y) {
    return g * y * (1 - y);
  }
};

}  // namespace nacre
