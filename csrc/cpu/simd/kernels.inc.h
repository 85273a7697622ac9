// The kernels, written once for every instruction set and dtype.
//
// Each kernels_<isa>.cpp includes this inside its namespace and its target region, after
// cpu/kernels.h and the intrinsics. What a kernel must see in memory: nothing beyond the elements
// named in its arguments; any alignment, except where a span asks for streaming stores.

#include "cpu/simd/vec.h"

#include "cpu/simd/activations.h"

// Columns that a reduction keeps in registers: 4 vectors give 8 independent chains of sums, enough
// to hide the latency of an fma; with half the registers' width, half the columns.
constexpr int kBlock = kParts == 1 ? 4 : kParts == 2 ? 2 : 1;

// ---- moments ----
//
// Single pass, shifted: with K near the chunk's mean, d = x - K, mean = K + sum(d) / n and
// m2 = sum(d^2) - sum(d)^2 / n. K is the mean of the chunk's first k = min(n, 8) rows; since those
// rows are part of the chunk, (K - mean)^2 <= variance * (n - k) / k whatever the data, so that the
// subtraction costs at most a factor n / k = 8 of the float32 rounding error. A constant column has
// d = 0 throughout. Chunks are combined in double (Chan, Golub & LeVeque 1979).

template <typename A>
struct ColumnSums {
  Vec<A> shift, sum, squares;
};

template <typename T, int kVectors, bool kPartial>
BN_INLINE void shifted_sums(const T* const* rows, int count, std::int64_t at, int lanes,
                            ColumnSums<Accumulate<T>>* out) {
  using A = Accumulate<T>;
  constexpr int kShiftRows = 8;
  const int head = count < kShiftRows ? count : kShiftRows;
  Vec<A> shift[kVectors], sum[kVectors], squares[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    shift[v] = kPartial ? load(rows[0] + at, lanes) : load(rows[0] + at + v * kLanes<A>);
    sum[v] = set1(A(0));
    squares[v] = set1(A(0));
  }
  for (int r = 1; r < head; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> x = kPartial ? load(rows[r] + at, lanes) : load(rows[r] + at + v * kLanes<A>);
      sum[v] = sum[v] + (x - shift[v]);
    }
  }
  const Vec<A> share = set1(A(1) / static_cast<A>(head));
  for (int v = 0; v < kVectors; ++v) {
    shift[v] = fma(sum[v], share, shift[v]);
    sum[v] = set1(A(0));
  }
  for (int r = 0; r < count; ++r) {
    const T* const row = rows[r] + at;
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> x = kPartial ? load(row, lanes) : load(row + v * kLanes<A>);
      const Vec<A> d = x - shift[v];
      sum[v] = sum[v] + d;
      squares[v] = fma(d, d, squares[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) out[v] = {shift[v], sum[v], squares[v]};
}

// Sums that overflowed float32, or hold inf or nan: again in double.
template <typename T>
__attribute__((noinline)) static void moments_in_double(const T* const* rows, int count,
                                                        std::int64_t at, double* mean,
                                                        double* m2) {
  double shift = 0;
  const double first = to_double(rows[0] + at);
  for (int r = 0; r < count; ++r) shift += to_double(rows[r] + at) - first;
  *mean = first - first == 0 ? first + shift / count : first;
  *m2 = 0;
  for (int r = 0; r < count; ++r) {
    const double d = to_double(rows[r] + at) - *mean;
    *m2 += d * d;
  }
}

template <typename T>
BN_INLINE void add_to_moments(const T* const* rows, int count, std::int64_t at, int lanes,
                              const ColumnSums<Accumulate<T>>& sums, double before, double* mean,
                              double* m2) {
  using A = Accumulate<T>;
  double chunk_mean[kLanes<A>], chunk_m2[kLanes<A>];
  A shift[kLanes<A>], sum[kLanes<A>], squares[kLanes<A>];
  store(shift, sums.shift);
  store(sum, sums.sum);
  store(squares, sums.squares);
  const double n = count, total = before + n, inverse = 1 / n;
  const double share = n / total, cross = before * share;
  for (int i = 0; i < kLanes<A>; ++i) {
    const double offset = double(sum[i]) * inverse;
    chunk_mean[i] = double(shift[i]) + offset;
    const double squared = double(squares[i]) - double(sum[i]) * offset;
    chunk_m2[i] = squared < 0 ? 0 : squared;
  }
  if (any_not_finite(sums.squares)) {
    for (int i = 0; i < lanes; ++i) {
      if (chunk_m2[i] - chunk_m2[i] == 0) continue;
      moments_in_double(rows, count, at + i, &chunk_mean[i], &chunk_m2[i]);
    }
  }
  if (lanes == kLanes<A>) {
    for (int i = 0; i < kLanes<A>; ++i) {
      const double delta = chunk_mean[i] - mean[at + i];
      mean[at + i] += delta * share;
      m2[at + i] += chunk_m2[i] + delta * delta * cross;
    }
  } else {
    for (int i = 0; i < lanes; ++i) {
      const double delta = chunk_mean[i] - mean[at + i];
      mean[at + i] += delta * share;
      m2[at + i] += chunk_m2[i] + delta * delta * cross;
    }
  }
}

template <typename T, int kVectors, bool kPartial>
BN_INLINE void moments_of_block(const T* const* rows, int count, std::int64_t at, int lanes,
                                double before, double* mean, double* m2) {
  using A = Accumulate<T>;
  ColumnSums<A> sums[kVectors];
  shifted_sums<T, kVectors, kPartial>(rows, count, at, lanes, sums);
  for (int v = 0; v < kVectors; ++v) {
    add_to_moments(rows, count, at + v * kLanes<A>, lanes, sums[v], before, mean, m2);
  }
}

template <typename T>
static void moments(const T* const* rows, int count, std::int64_t cols, double before,
                    double* mean, double* m2) {
  constexpr int kLane = kLanes<Accumulate<T>>;
  std::int64_t at = 0;
  for (; at + kBlock * kLane <= cols; at += kBlock * kLane) {
    moments_of_block<T, kBlock, false>(rows, count, at, kLane, before, mean, m2);
  }
  for (; at + kLane <= cols; at += kLane) {
    moments_of_block<T, 1, false>(rows, count, at, kLane, before, mean, m2);
  }
  if (at < cols) {
    moments_of_block<T, 1, true>(rows, count, at, static_cast<int>(cols - at), before, mean, m2);
  }
}

// ---- shared by forward and backward: z, and dz from dy ----

template <typename A>
struct Affine {
  Vec<A> center, scale, shift;
};

template <bool kPerColumn, typename A>
BN_INLINE Vec<A> parameter(const A* values, std::int64_t at, int lanes, bool partial) {
  if constexpr (!kPerColumn) return set1(values[0]);
  return partial ? load(values + at, lanes) : load(values + at);
}

template <bool kPerColumn, typename A>
BN_INLINE Affine<A> affine_at(const ForwardParams<A>& p, std::int64_t at, int lanes,
                              bool partial) {
  return {parameter<kPerColumn>(p.center, at, lanes, partial),
          parameter<kPerColumn>(p.scale, at, lanes, partial),
          parameter<kPerColumn>(p.shift, at, lanes, partial)};
}

// z as the forward pass had it, to the last bit: the one place where it is computed.
template <typename T, typename Act>
BN_INLINE Vec<Accumulate<T>> pre_activation(const Vec<Accumulate<T>>& centered,
                                            const Affine<Accumulate<T>>& affine,
                                            const T* residual, int lanes, bool partial) {
  Vec<Accumulate<T>> z = fma(centered, affine.scale, affine.shift);
  if (residual) z = z + (partial ? load(residual, lanes) : load(residual));
  if constexpr (Act::kPiecewiseLinear) return round_to<T>(z);
  return z;
}

// Bits of a mask for kLanes elements from element at, which is a multiple of 8.
template <typename A>
BN_INLINE void write_bits(std::uint8_t* mask, std::int64_t at, int lanes, unsigned bits) {
  mask[at / 8] = static_cast<std::uint8_t>(bits);
  if (kLanes<A> > 8 && lanes > 8) mask[at / 8 + 1] = static_cast<std::uint8_t>(bits >> 8);
}
template <typename A>
BN_INLINE unsigned read_bits(const std::uint8_t* mask, std::int64_t at, int lanes) {
  unsigned bits = mask[at / 8];
  if (kLanes<A> > 8 && lanes > 8) bits |= static_cast<unsigned>(mask[at / 8 + 1]) << 8;
  return bits;
}

// dz = dy * act'(z); set bits of the mask are lanes whose derivative is 1.
template <typename T, typename Act>
BN_INLINE Vec<Accumulate<T>> activation_gradient(const Vec<Accumulate<T>>& dy,
                                                 const Vec<Accumulate<T>>& centered,
                                                 const Affine<Accumulate<T>>& affine,
                                                 const T* residual, const std::uint8_t* mask,
                                                 std::int64_t at, Accumulate<T> param, int lanes,
                                                 bool partial) {
  using A = Accumulate<T>;
  if constexpr (Act::kPiecewiseLinear) {
    if (mask) {
      return select(from_bits<A>(read_bits<A>(mask, at, lanes)), dy, Act::dropped(dy, param));
    }
    const Vec<A> z = pre_activation<T, Act>(centered, affine, residual, lanes, partial);
    return select(Act::drops(z), Act::dropped(dy, param), dy);
  } else if constexpr (__is_same(Act, Identity)) {
    return dy;
  } else {
    const Vec<A> z = pre_activation<T, Act>(centered, affine, residual, lanes, partial);
    return dy * Act::derivative(z, param);
  }
}

// ---- forward: y = act((x - center) * scale + shift [+ residual]) ----

template <typename T, typename Act, bool kPerColumn, bool kPartial>
BN_INLINE void forward_vector(const ForwardSpan<T>& s, const ForwardParams<Accumulate<T>>& p,
                              const Affine<Accumulate<T>>& affine, std::int64_t at, int lanes,
                              bool stream) {
  using A = Accumulate<T>;
  const Vec<A> x = kPartial ? load(s.x + at, lanes) : load(s.x + at);
  const Vec<A> z = pre_activation<T, Act>(x - affine.center, affine,
                                          s.residual ? s.residual + at : nullptr, lanes, kPartial);
  if constexpr (Act::kPiecewiseLinear) {
    if (s.mask) write_bits<A>(s.mask, at, lanes, ~to_bits(Act::drops(z)));
  }
  const Vec<A> y = Act::value(z, p.activation_param);
  if constexpr (kPartial) {
    store(s.y + at, y, lanes);
  } else if (stream) {
    store_streaming(s.y + at, y);
  } else {
    store(s.y + at, y);
  }
}

BN_INLINE bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
}

template <typename T, typename Act, bool kPerColumn>
static void forward(const ForwardSpan<T>& s, const ForwardParams<Accumulate<T>>& p) {
  using A = Accumulate<T>;
  const bool stream = s.stream && is_aligned(s.y);
  const Affine<A> shared = affine_at<false>(p, 0, 0, false);
  std::int64_t at = 0;
  for (; at + kLanes<A> <= s.length; at += kLanes<A>) {
    const Affine<A> affine = kPerColumn ? affine_at<kPerColumn>(p, at, 0, false) : shared;
    forward_vector<T, Act, kPerColumn, false>(s, p, affine, at, kLanes<A>, stream);
  }
  if (at < s.length) {
    const int lanes = static_cast<int>(s.length - at);
    const Affine<A> affine = affine_at<kPerColumn>(p, at, lanes, true);
    forward_vector<T, Act, kPerColumn, true>(s, p, affine, at, lanes, false);
  }
}

// ---- backward: the two sums per channel ----

template <typename T, typename Act, int kVectors, bool kPartial>
BN_INLINE void sums_of_block(const BackwardRows<T>& rows, int count, std::int64_t at, int lanes,
                             const ForwardParams<Accumulate<T>>& p, double* sum, double* dot) {
  using A = Accumulate<T>;
  Affine<A> affine[kVectors];
  Vec<A> sums[kVectors], dots[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    affine[v] = affine_at<true>(p, at + v * kLanes<A>, lanes, kPartial);
    sums[v] = set1(A(0));
    dots[v] = set1(A(0));
  }
  for (int r = 0; r < count; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t here = at + v * kLanes<A>;
      const Vec<A> x = kPartial ? load(rows.x[r] + here, lanes) : load(rows.x[r] + here);
      const Vec<A> dy = kPartial ? load(rows.dy[r] + here, lanes) : load(rows.dy[r] + here);
      const Vec<A> centered = x - affine[v].center;
      const Vec<A> dz = activation_gradient<T, Act>(
          dy, centered, affine[v], rows.has_residual ? rows.residual[r] + here : nullptr,
          rows.has_mask ? rows.mask[r] : nullptr, here, p.activation_param, lanes, kPartial);
      sums[v] = sums[v] + dz;
      dots[v] = fma(dz, centered, dots[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    A some_sums[kLanes<A>], some_dots[kLanes<A>];
    store(some_sums, sums[v]);
    store(some_dots, dots[v]);
    for (int i = 0; i < (kPartial ? lanes : kLanes<A>); ++i) {
      sum[at + v * kLanes<A> + i] += static_cast<double>(some_sums[i]);
      dot[at + v * kLanes<A> + i] += static_cast<double>(some_dots[i]);
    }
  }
}

template <typename T, typename Act>
static void backward_sums(const BackwardRows<T>& rows, int count, std::int64_t cols,
                          const ForwardParams<Accumulate<T>>& p, double* sum, double* dot) {
  constexpr int kLane = kLanes<Accumulate<T>>;
  constexpr bool kCheap = Act::kPiecewiseLinear || __is_same(Act, Identity);
  constexpr int kVectors = kCheap ? kBlock : 1;  // the smooth ones are bound by their arithmetic
  std::int64_t at = 0;
  for (; at + kVectors * kLane <= cols; at += kVectors * kLane) {
    sums_of_block<T, Act, kVectors, false>(rows, count, at, kLane, p, sum, dot);
  }
  if constexpr (kVectors > 1) {
    for (; at + kLane <= cols; at += kLane) {
      sums_of_block<T, Act, 1, false>(rows, count, at, kLane, p, sum, dot);
    }
  }
  if (at < cols) {
    sums_of_block<T, Act, 1, true>(rows, count, at, static_cast<int>(cols - at), p, sum, dot);
  }
}

// ---- backward: dx = scale * dz + (x - center) * slope + offset ----

template <typename T, typename Act, bool kPerColumn, bool kPartial>
BN_INLINE void backward_vector(const BackwardSpan<T>& s, const BackwardParams<Accumulate<T>>& p,
                               const Affine<Accumulate<T>>& affine, Vec<Accumulate<T>> slope,
                               Vec<Accumulate<T>> offset, std::int64_t at, int lanes,
                               bool stream) {
  using A = Accumulate<T>;
  const Vec<A> dy = kPartial ? load(s.dy + at, lanes) : load(s.dy + at);
  const Vec<A> x = kPartial ? load(s.x + at, lanes) : load(s.x + at);
  const Vec<A> centered = x - affine.center;
  const Vec<A> dz = activation_gradient<T, Act>(
      dy, centered, affine, s.residual ? s.residual + at : nullptr, s.mask, at,
      p.forward.activation_param, lanes, kPartial);
  const Vec<A> dx = p.slope ? fma(affine.scale, dz, fma(slope, centered, offset))
                            : affine.scale * dz;
  if constexpr (kPartial) {
    if (s.dx) store(s.dx + at, dx, lanes);
    if (s.dresidual) store(s.dresidual + at, dz, lanes);
  } else if (stream) {
    if (s.dx) store_streaming(s.dx + at, dx);
    if (s.dresidual) store_streaming(s.dresidual + at, dz);
  } else {
    if (s.dx) store(s.dx + at, dx);
    if (s.dresidual) store(s.dresidual + at, dz);
  }
}

template <typename T, typename Act, bool kPerColumn>
static void backward(const BackwardSpan<T>& s, const BackwardParams<Accumulate<T>>& p) {
  using A = Accumulate<T>;
  const bool stream = s.stream && (!s.dx || is_aligned(s.dx)) &&
                      (!s.dresidual || is_aligned(s.dresidual));
  const Vec<A> zero = set1(A(0));
  const Affine<A> shared = affine_at<false>(p.forward, 0, 0, false);
  const Vec<A> shared_slope = p.slope ? set1(p.slope[0]) : zero;
  const Vec<A> shared_offset = p.slope ? set1(p.offset[0]) : zero;
  std::int64_t at = 0;
  for (; at + kLanes<A> <= s.length; at += kLanes<A>) {
    if constexpr (kPerColumn) {
      backward_vector<T, Act, true, false>(
          s, p, affine_at<true>(p.forward, at, 0, false), p.slope ? load(p.slope + at) : zero,
          p.slope ? load(p.offset + at) : zero, at, kLanes<A>, stream);
    } else {
      backward_vector<T, Act, false, false>(s, p, shared, shared_slope, shared_offset, at,
                                            kLanes<A>, stream);
    }
  }
  if (at < s.length) {
    const int lanes = static_cast<int>(s.length - at);
    backward_vector<T, Act, kPerColumn, true>(
        s, p, affine_at<kPerColumn>(p.forward, at, lanes, true),
        p.slope ? parameter<kPerColumn>(p.slope, at, lanes, true) : zero,
        p.slope ? parameter<kPerColumn>(p.offset, at, lanes, true) : zero, at, lanes, false);
  }
}

// ---- the table ----

template <typename T, typename Act>
constexpr void fill(Kernels<T>& k, Activation activation) {
  const int i = static_cast<int>(activation);
  k.forward[i][Kernels<T>::kShared] = forward<T, Act, false>;
  k.forward[i][Kernels<T>::kPerColumn] = forward<T, Act, true>;
  k.backward_sums[i] = backward_sums<T, Act>;
  k.backward[i][Kernels<T>::kShared] = backward<T, Act, false>;
  k.backward[i][Kernels<T>::kPerColumn] = backward<T, Act, true>;
}

template <typename T>
constexpr Kernels<T> make_table() {
  Kernels<T> k{};
  k.moments = moments<T>;
  fill<T, Identity>(k, Activation::kIdentity);
  fill<T, Relu>(k, Activation::kRelu);
  fill<T, Relu6>(k, Activation::kRelu6);
  fill<T, LeakyRelu>(k, Activation::kLeakyRelu);
  fill<T, Elu>(k, Activation::kElu);
  fill<T, Silu>(k, Activation::kSilu);
  fill<T, Gelu>(k, Activation::kGelu);
  fill<T, GeluTanh>(k, Activation::kGeluTanh);
  fill<T, Hardswish>(k, Activation::kHardswish);
  return k;
}

template <typename T>
constexpr Kernels<T> kTable = make_table<T>();

template <typename T>
const Kernels<T>& table() {
  return kTable<T>;
}
template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();
template const Kernels<BFloat16>& table<BFloat16>();
template const Kernels<Half>& table<Half>();

#undef BN_INLINE
