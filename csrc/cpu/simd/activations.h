// The activations on vectors: value, and derivative with respect to z.
//
// Included like vec.h. The smooth ones' elementary functions are accurate to a few ulp of the
// accumulate type; NaN goes through all of them. Formulas are those of torch.nn.functional.

// p * 2^k, where k lies in the low bits of shifted (see exp). Half of 2^k twice, since k = 128 has
// no float of its own.
BN_INLINE NativeFloat scaled_by_power(NativeFloat p, NativeFloat shifted) {
  const NativeInt32 exponent = (NativeInt32)shifted - 0x4b400000;
  const NativeInt32 half = exponent >> 1;
  const NativeFloat a = (NativeFloat)((half + 127) << 23);
  const NativeFloat b = (NativeFloat)((exponent - half + 127) << 23);
  return p * a * b;
}

// exp(x): x = k ln2 + r, Taylor series of degree 7 on |r| <= ln2 / 2 (remainder 5e-9).
BN_INLINE Vec<float> exp(const Vec<float>& x) {
  const Vec<float> low = set1(-104.0f), high = set1(89.0f);  // exp of these is 0 and inf
  const Vec<float> clamped = select(x < low, low, select(x > high, high, x));
  const Vec<float> magic = set1(12582912.0f);  // 1.5 * 2^23: its sum with k has k in the low bits
  const Vec<float> shifted = fma(clamped, set1(1.44269504f), magic);
  const Vec<float> k = shifted - magic;
  Vec<float> r = fma(k, set1(-0.693359375f), clamped);
  r = fma(k, set1(2.12194440e-4f), r);
  Vec<float> p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  Vec<float> y;
  BN_EACH_PART(i, y.part[i] = scaled_by_power(p.part[i], shifted.part[i]));
  return y;
}

// exp(x) - 1 for x <= 0: Taylor series of degree 8 where the difference would cancel.
BN_INLINE Vec<float> expm1_negative(const Vec<float>& x) {
  Vec<float> p = set1(1.0f / 40320);
  p = fma(p, x, set1(1.0f / 5040));
  p = fma(p, x, set1(1.0f / 720));
  p = fma(p, x, set1(1.0f / 120));
  p = fma(p, x, set1(1.0f / 24));
  p = fma(p, x, set1(1.0f / 6));
  p = fma(p, x, set1(0.5f));
  p = fma(p * x, x, x);
  return select(x > set1(-0.5f), p, exp(x) - set1(1.0f));
}

// The standard normal distribution function. erfc(u) = t exp(-u^2) P(t), t = 1 / (1 + 0.375 u),
// the form of Abramowitz & Stegun 7.1.26; P fitted for least relative error (1.4e-8, u <= 9.5).
BN_INLINE Vec<float> normal_cdf(const Vec<float>& z) {
  const Vec<float> zero = set1(0.0f);
  const Vec<float> magnitude = select(z < zero, zero - z, z);
  const Vec<float> u = magnitude * set1(0.70710678f);
  const Vec<float> t = set1(1.0f) / fma(u, set1(0.375f), set1(1.0f));
  Vec<float> p = set1(0.061990687f);
  p = fma(p, t, set1(-0.289530914f));
  p = fma(p, t, set1(0.436961532f));
  p = fma(p, t, set1(-0.234664192f));
  p = fma(p, t, set1(0.277384550f));
  p = fma(p, t, set1(0.119926402f));
  p = fma(p, t, set1(0.205724043f));
  p = fma(p, t, set1(0.210590888f));
  p = fma(p, t, set1(0.211617015f));
  const Vec<float> tail = set1(0.5f) * t * p * exp(z * z * set1(-0.5f));
  return select(z > zero, set1(1.0f) - tail, tail);
}

// Double precision is for checks and small problems: the C library, lane by lane.
#define BN_LANEWISE(NAME, EXPRESSION)                                           \
  BN_INLINE Vec<double> NAME(const Vec<double>& x) {                            \
    Vec<double> y;                                                              \
    _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i) {                  \
      _Pragma("GCC unroll 8") for (int k = 0; k < kLanesPerPart<double>; ++k) { \
        const double v = x.part[i][k];                                          \
        y.part[i][k] = EXPRESSION;                                              \
      }                                                                         \
    }                                                                           \
    return y;                                                                   \
  }
BN_LANEWISE(exp, __builtin_exp(v))
BN_LANEWISE(expm1_negative, __builtin_expm1(v))
BN_LANEWISE(normal_cdf, 0.5 * __builtin_erfc(v * -0.70710678118654752440))
#undef BN_LANEWISE

template <typename A>
BN_INLINE Vec<A> sigmoid(const Vec<A>& z) {
  return set1(A(1)) / (set1(A(1)) + exp(set1(A(0)) - z));
}

struct Identity {
  static constexpr bool kPiecewiseLinear = false;
  static constexpr bool kOfRounded = false;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A) {
    return z;
  }
};

// What decides whether z, rounded to T, is above 0 and below 6: then z itself need not be rounded.
template <typename T>
struct Rounded {
  static constexpr T kToZero = 0;  // the largest that rounds to 0
  static constexpr T kToSix = 6;   // the least that rounds to 6
};
template <>
struct Rounded<BFloat16> {
#if BATCHNORM_HAS_BF16
  static constexpr float kToZero = 0x0.fffffep-126f;  // the largest denormal
#else
  static constexpr float kToZero = 0x1p-134f;
#endif
  static constexpr float kToSix = 6 - 0x1p-6f;
};
template <>
struct Rounded<Half> {
  static constexpr float kToZero = 0x1p-25f;
  static constexpr float kToSix = 6 - 0x1p-9f;
};

// Piecewise linear: of z as it would be stored. drops(z) says where the derivative is not 1;
// there the gradient is dropped(). kOfRounded: z has to be rounded first; the value of others is
// the same, rounded, from z itself.
struct Relu {
  static constexpr bool kPiecewiseLinear = true;
  static constexpr bool kOfRounded = false;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A) {
    return select(z <= set1(A(0)), set1(A(0)), z);
  }
  template <typename T>
  BN_INLINE Lanes<Accumulate<T>> drops(const Vec<Accumulate<T>>& z) {
    return z <= set1(Rounded<T>::kToZero);
  }
  template <typename A>
  BN_INLINE Vec<A> dropped(const Vec<A>&, A) {
    return set1(A(0));
  }
};

struct Relu6 {
  static constexpr bool kPiecewiseLinear = true;
  static constexpr bool kOfRounded = false;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A) {
    const Vec<A> low = select(z <= set1(A(0)), set1(A(0)), z);
    return select(low >= set1(A(6)), set1(A(6)), low);
  }
  template <typename T>
  BN_INLINE Lanes<Accumulate<T>> drops(const Vec<Accumulate<T>>& z) {
    return (z <= set1(Rounded<T>::kToZero)) | (z >= set1(Rounded<T>::kToSix));
  }
  template <typename A>
  BN_INLINE Vec<A> dropped(const Vec<A>&, A) {
    return set1(A(0));
  }
};

struct LeakyRelu {
  static constexpr bool kPiecewiseLinear = true;
  static constexpr bool kOfRounded = true;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A slope) {
    return select(z > set1(A(0)), z, z * set1(slope));
  }
  template <typename T>
  BN_INLINE Lanes<Accumulate<T>> drops(const Vec<Accumulate<T>>& z) {
    return ~(z > set1(Accumulate<T>(0)));  // nan too
  }
  template <typename A>
  BN_INLINE Vec<A> dropped(const Vec<A>& dy, A slope) {
    return dy * set1(slope);
  }
};

struct Elu {
  static constexpr bool kPiecewiseLinear = false;
  static constexpr bool kOfRounded = false;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A alpha) {
    const Vec<A> negative = set1(alpha) * expm1_negative(select(z > set1(A(0)), set1(A(0)), z));
    return select(z > set1(A(0)), z, negative);
  }
  template <typename A>
  BN_INLINE Vec<A> derivative(const Vec<A>& z, A alpha) {
    return select(z > set1(A(0)), set1(A(1)), set1(alpha) * exp(z));
  }
};

struct Silu {
  static constexpr bool kPiecewiseLinear = false;
  static constexpr bool kOfRounded = false;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A) {
    return z / (set1(A(1)) + exp(set1(A(0)) - z));
  }
  template <typename A>
  BN_INLINE Vec<A> derivative(const Vec<A>& z, A) {
    const Vec<A> s = sigmoid(z);
    return s * fma(z, set1(A(1)) - s, set1(A(1)));
  }
};

struct Gelu {
  static constexpr bool kPiecewiseLinear = false;
  static constexpr bool kOfRounded = false;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A) {
    return z * normal_cdf(z);
  }
  template <typename A>
  BN_INLINE Vec<A> derivative(const Vec<A>& z, A) {
    const Vec<A> density = set1(A(0.39894228040143267794)) * exp(z * z * set1(A(-0.5)));
    return fma(z, density, normal_cdf(z));
  }
};

// 0.5 (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3).
struct GeluTanh {
  static constexpr bool kPiecewiseLinear = false;
  static constexpr bool kOfRounded = false;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A) {
    return z * sigmoid(twice_u(z));
  }
  template <typename A>
  BN_INLINE Vec<A> derivative(const Vec<A>& any, A) {
    // Beyond 64 it is 0 or 1, and z^2 could overflow.
    const Vec<A> low = set1(A(-64)), high = set1(A(64));
    const Vec<A> z = select(any < low, low, select(any > high, high, any));
    const Vec<A> s = sigmoid(twice_u(z));
    const Vec<A> slope = fma(z * z, set1(A(kTwiceRoot * 3 * 0.044715)), set1(A(kTwiceRoot)));
    return fma(z * s * (set1(A(1)) - s), slope, s);
  }

 private:
  static constexpr double kTwiceRoot = 1.59576912160573071176;  // 2 sqrt(2 / pi)
  template <typename A>
  BN_INLINE Vec<A> twice_u(const Vec<A>& z) {
    return z * fma(z * z, set1(A(kTwiceRoot * 0.044715)), set1(A(kTwiceRoot)));
  }
};

struct Hardswish {
  static constexpr bool kPiecewiseLinear = false;
  static constexpr bool kOfRounded = false;
  template <typename A>
  BN_INLINE Vec<A> value(const Vec<A>& z, A) {
    const Vec<A> low = select(z <= set1(A(-3)), set1(A(0)), z + set1(A(3)));
    return z * select(low >= set1(A(6)), set1(A(6)), low) / set1(A(6));
  }
  template <typename A>
  BN_INLINE Vec<A> derivative(const Vec<A>& z, A) {
    const Vec<A> middle = z / set1(A(3)) + set1(A(0.5));
    return select(z <= set1(A(-3)), set1(A(0)), select(z >= set1(A(3)), set1(A(1)), middle));
  }
};
