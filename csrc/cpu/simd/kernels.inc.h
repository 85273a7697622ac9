// The kernels, written once for every instruction set and dtype.
//
// Each kernels_<isa>.cpp includes this inside its namespace and its target region, after
// cpu/kernels.h and the intrinsics. What a kernel must see in memory: nothing beyond the elements
// named in its arguments; any alignment, except where a span asks for streaming stores.

#include "cpu/simd/vec.h"

#include "cpu/simd/activations.h"

// ---- moments ----
//
// Single pass, shifted: with K near the chunk's mean, d = x - K, mean = K + sum(d) / n and
// m2 = sum(d^2) - sum(d)^2 / n. K is the mean of the chunk's first k values; since those are part
// of the chunk, (K - mean)^2 <= variance * (n - k) / k whatever the data, so that the subtraction
// costs at most a factor n / k of the float32 rounding error (k = n / 8 or more, but for short
// chunks). A constant chunk has d = 0 throughout. Chunks are combined in double (Chan, Golub &
// LeVeque 1979).

// Of a column: K, sum(d), sum(d^2).
template <typename A>
struct ShiftedSums {
  Vec<A> shift, sum, squares;
};

// A reduction over columns walks the rows of a chunk in groups. In between, a group's sums lie in
// the first-level cache. Long rows go in small groups: as many streams as the hardware's
// prefetchers follow. Short rows are one stream together, and all go at once, in registers.
constexpr int kGroupRows = 8;
constexpr std::int64_t kShortRow = 1024;  // bytes

template <typename T>
BN_INLINE int group_rows(std::int64_t cols, int count) {
  return cols * static_cast<std::int64_t>(sizeof(T)) <= kShortRow ? count : kGroupRows;
}

// Columns side by side, for independent chains of sums: enough to hide an addition's latency.
constexpr int kBlock = kParts == 1 ? 4 : kParts == 2 ? 2 : 1;

// What a reduction sees of the rows: [begin, end) of the chunk's count, at these columns.
struct Block {
  int begin, end, count;
  std::int64_t at, padded;  // padded: distance between kinds of sums in the scratch memory
  int lanes;
};

template <typename T, bool kPartial>
BN_INLINE Vec<Accumulate<T>> load_at(const T* row, const Block& b, int v) {
  return kPartial ? load(row + b.at, b.lanes) : load(row + b.at + v * kLanes<Accumulate<T>>);
}

// K is the mean of the chunk's first rows.
template <typename T, int kVectors, bool kPartial>
BN_INLINE void start_sums(const T* const* rows, const Block& b,
                          ShiftedSums<Accumulate<T>>* sums) {
  using A = Accumulate<T>;
  const int head = b.count < kGroupRows ? b.count : kGroupRows;
  Vec<A> first[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    first[v] = load_at<T, kPartial>(rows[0], b, v);
    sums[v] = {set1(A(0)), set1(A(0)), set1(A(0))};
  }
  for (int r = 1; r < head; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[v].shift = sums[v].shift + (load_at<T, kPartial>(rows[r], b, v) - first[v]);
    }
  }
  const Vec<A> share = set1(A(1) / static_cast<A>(head));
  for (int v = 0; v < kVectors; ++v) sums[v].shift = fma(sums[v].shift, share, first[v]);
}

template <typename T, int kVectors, bool kPartial>
BN_INLINE void add_rows(const T* const* rows, const Block& b, ShiftedSums<Accumulate<T>>* sums) {
  using A = Accumulate<T>;
  for (int r = b.begin; r < b.end; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> d = load_at<T, kPartial>(rows[r], b, v) - sums[v].shift;
      sums[v].sum = sums[v].sum + d;
      sums[v].squares = fma(d, d, sums[v].squares);
    }
  }
}

// Sums that overflowed float32, or hold inf or nan: again in double. at(i) is where value i lies.
template <typename T, typename At>
__attribute__((noinline)) static Moments moments_in_double(At at, std::int64_t count) {
  const double first = to_double(at(0));
  double shift = 0;
  for (std::int64_t i = 0; i < count; ++i) shift += to_double(at(i)) - first;
  Moments m;
  m.count = static_cast<double>(count);
  m.mean = first - first == 0 ? first + shift / m.count : first;
  for (std::int64_t i = 0; i < count; ++i) {
    const double d = to_double(at(i)) - m.mean;
    m.m2 += d * d;
  }
  return m;
}

// The values of a column, and those of a run.
template <typename T>
struct InColumn {
  const T* const* rows;
  std::int64_t column;
  BN_MEMBER const T* operator()(std::int64_t i) const { return rows[i] + column; }
};
template <typename T>
struct InRun {
  const T* first;
  BN_MEMBER const T* operator()(std::int64_t i) const { return first + i; }
};

// A chunk's moments join those of the rows before it.
template <typename T>
BN_INLINE void add_to_moments(const T* const* rows, int count, std::int64_t at, int lanes,
                              const ShiftedSums<Accumulate<T>>& sums, double before, double* mean,
                              double* m2) {
  using A = Accumulate<T>;
  double chunk_mean[kLanes<A>], chunk_m2[kLanes<A>];
  const double inverse = 1.0 / count;
  for (int i = 0; i < kWideParts<A>; ++i) {
    const auto shift = wide(sums.shift, i), sum = wide(sums.sum, i), squares = wide(sums.squares, i);
    const auto offset = sum * inverse;
    const auto squared = squares - sum * offset;
    poke(chunk_mean + i * kWideLanes, shift + offset);
    poke(chunk_m2 + i * kWideLanes, squared < 0.0 ? NativeDouble{} : squared);
  }
  if (any_not_finite(sums.squares)) {
    for (int i = 0; i < lanes; ++i) {
      if (chunk_m2[i] - chunk_m2[i] == 0) continue;
      const Moments m = moments_in_double<T>(InColumn<T>{rows, at + i}, count);
      chunk_mean[i] = m.mean;
      chunk_m2[i] = m.m2;
    }
  }
  const double share = count / (before + count), cross = before * share;
  double some_mean[kLanes<A>], some_m2[kLanes<A>];
  const bool all = lanes == kLanes<A>;
  double* const to_mean = all ? mean + at : some_mean;
  double* const to_m2 = all ? m2 + at : some_m2;
  if (!all) {
    for (int i = 0; i < kLanes<A>; ++i) {
      some_mean[i] = i < lanes ? mean[at + i] : 0;
      some_m2[i] = i < lanes ? m2[at + i] : 0;
    }
  }
  for (int i = 0; i < kWideParts<A>; ++i) {
    const auto old_mean = peek<NativeDouble>(to_mean + i * kWideLanes);
    const auto old_m2 = peek<NativeDouble>(to_m2 + i * kWideLanes);
    const auto delta = peek<NativeDouble>(chunk_mean + i * kWideLanes) - old_mean;
    poke(to_mean + i * kWideLanes, old_mean + delta * share);
    poke(to_m2 + i * kWideLanes,
         old_m2 + peek<NativeDouble>(chunk_m2 + i * kWideLanes) + delta * delta * cross);
  }
  if (!all) {
    for (int i = 0; i < lanes; ++i) {
      mean[at + i] = some_mean[i];
      m2[at + i] = some_m2[i];
    }
  }
}

// kept: K, sum(d) and sum(d^2) of each column between groups.
template <typename T, int kVectors, bool kPartial>
BN_INLINE void moments_of_block(const T* const* rows, const Block& b, Accumulate<T>* kept,
                                double before, double* mean, double* m2) {
  using A = Accumulate<T>;
  ShiftedSums<A> sums[kVectors];
  if (b.begin == 0) {
    start_sums<T, kVectors, kPartial>(rows, b, sums);
  } else {
    for (int v = 0; v < kVectors; ++v) {
      const A* const at = kept + b.at + v * kLanes<A>;
      sums[v] = {load(at), load(at + b.padded), load(at + 2 * b.padded)};
    }
  }
  add_rows<T, kVectors, kPartial>(rows, b, sums);
  for (int v = 0; v < kVectors; ++v) {
    if (b.end == b.count) {
      add_to_moments(rows, b.count, b.at + v * kLanes<A>, b.lanes, sums[v], before, mean, m2);
      continue;
    }
    A* const at = kept + b.at + v * kLanes<A>;
    store(at, sums[v].shift);
    store(at + b.padded, sums[v].sum);
    store(at + 2 * b.padded, sums[v].squares);
  }
}

template <typename T>
static void column_moments(const T* const* rows, int count, std::int64_t cols,
                           Accumulate<T>* kept, double before, double* mean, double* m2) {
  constexpr int kLane = kLanes<Accumulate<T>>;
  const std::int64_t padded = (cols + kLane - 1) / kLane * kLane;
  const int group = group_rows<T>(cols, count);
  for (int begin = 0; begin < count; begin += group) {
    Block b{begin, begin + group < count ? begin + group : count, count, 0, padded, kLane};
    for (; b.at + kBlock * kLane <= cols; b.at += kBlock * kLane) {
      moments_of_block<T, kBlock, false>(rows, b, kept, before, mean, m2);
    }
    for (; b.at + kLane <= cols; b.at += kLane) {
      moments_of_block<T, 1, false>(rows, b, kept, before, mean, m2);
    }
    b.lanes = static_cast<int>(cols - b.at);
    if (b.lanes > 0) moments_of_block<T, 1, true>(rows, b, kept, before, mean, m2);
  }
}

// One channel's run of length <= kRunLength: K is shared by all lanes, so that the lanes' sums just
// add up.
template <typename T>
static Moments run_moments(const T* x, std::int64_t length) {
  using A = Accumulate<T>;
  constexpr int kLane = kLanes<A>;
  constexpr int kVectors = 4;
  const Vec<A> first = set1(static_cast<A>(to_double(x)));
  Vec<A> sum[kVectors], squares[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = squares[v] = set1(A(0));
  const std::int64_t head = length / 8 / kLane * kLane;
  for (std::int64_t at = 0; at < head; at += kLane) sum[0] = sum[0] + (load(x + at) - first);
  const double guess = head == 0 ? 0 : total(sum[0]) / static_cast<double>(head);
  const Vec<A> shift = first + set1(static_cast<A>(guess));
  sum[0] = set1(A(0));

  std::int64_t at = 0;
  for (; at + kVectors * kLane <= length; at += kVectors * kLane) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> d = load(x + at + v * kLane) - shift;
      sum[v] = sum[v] + d;
      squares[v] = fma(d, d, squares[v]);
    }
  }
  for (; at + kLane <= length; at += kLane) {
    const Vec<A> d = load(x + at) - shift;
    sum[0] = sum[0] + d;
    squares[0] = fma(d, d, squares[0]);
  }
  if (at < length) {
    const int lanes = static_cast<int>(length - at);
    const Vec<A> zero = set1(A(0));
    const Vec<A> d = select(first_lanes<A>(lanes), load(x + at, lanes) - shift, zero);
    sum[1] = sum[1] + d;
    squares[1] = fma(d, d, squares[1]);
  }
  const double n = static_cast<double>(length);
  const double all = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  const double all_squares = total((squares[0] + squares[1]) + (squares[2] + squares[3]));
  if (!(all_squares - all_squares == 0)) return moments_in_double<T>(InRun<T>{x}, length);
  const double squared = all_squares - all * (all / n);
  Moments m;
  m.mean = static_cast<double>(shift.part[0][0]) + all / n;
  m.m2 = squared < 0 ? 0 : squared;
  m.count = n;
  return m;
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

BN_INLINE bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
}

template <typename T, typename Act, bool kPartial>
BN_INLINE void forward_vector(const ForwardSpan<T>& s, const Affine<Accumulate<T>>& affine,
                              Accumulate<T> param, std::int64_t at, int lanes, bool stream) {
  using A = Accumulate<T>;
  const Vec<A> x = kPartial ? load(s.x + at, lanes) : load(s.x + at);
  const Vec<A> z = pre_activation<T, Act>(x - affine.center, affine,
                                          s.residual ? s.residual + at : nullptr, lanes, kPartial);
  if constexpr (Act::kPiecewiseLinear) {
    if (s.mask) write_bits<A>(s.mask, at, lanes, ~to_bits(Act::drops(z)));
  }
  const Vec<A> y = Act::value(z, param);
  if constexpr (kPartial) {
    store(s.y + at, y, lanes);
  } else if (stream) {
    store_streaming(s.y + at, y);
  } else {
    store(s.y + at, y);
  }
}

// span and params are copied, so that the compiler knows that no store changes them.
template <typename T, typename Act, bool kPerColumn>
static void forward(const ForwardSpan<T>& span, const ForwardParams<Accumulate<T>>& params) {
  using A = Accumulate<T>;
  const ForwardSpan<T> s = span;
  const ForwardParams<A> p = params;
  const bool stream = s.stream && is_aligned(s.y);
  const Affine<A> shared = affine_at<false>(p, 0, 0, false);
  std::int64_t at = 0;
#pragma GCC unroll 4
  for (; at + kLanes<A> <= s.length; at += kLanes<A>) {
    const Affine<A> affine = kPerColumn ? affine_at<kPerColumn>(p, at, 0, false) : shared;
    __builtin_prefetch(s.x + at + s.ahead);
    forward_vector<T, Act, false>(s, affine, p.activation_param, at, kLanes<A>, stream);
  }
  if (at < s.length) {
    const int lanes = static_cast<int>(s.length - at);
    const Affine<A> affine = affine_at<kPerColumn>(p, at, lanes, true);
    forward_vector<T, Act, true>(s, affine, p.activation_param, at, lanes, false);
  }
}

// ---- backward: the two sums per channel, sum(dz) and sum(dz * (x - center)) ----

template <typename A>
struct GradientSums {
  Vec<A> sum, dot;
};

template <typename T, typename Act, bool kPartial>
BN_INLINE void add_gradient(const T* x, const T* dy, const T* residual, const std::uint8_t* mask,
                            std::int64_t at, int lanes, const Affine<Accumulate<T>>& affine,
                            Accumulate<T> param, GradientSums<Accumulate<T>>* sums) {
  using A = Accumulate<T>;
  const Vec<A> x_here = kPartial ? load(x + at, lanes) : load(x + at);
  const Vec<A> dy_here = kPartial ? load(dy + at, lanes) : load(dy + at);
  Vec<A> centered = x_here - affine.center;
  Vec<A> dz = activation_gradient<T, Act>(dy_here, centered, affine,
                                          residual ? residual + at : nullptr, mask, at, param,
                                          lanes, kPartial);
  if constexpr (kPartial) {
    dz = select(first_lanes<A>(lanes), dz, set1(A(0)));
    centered = select(first_lanes<A>(lanes), centered, set1(A(0)));
  }
  sums->sum = sums->sum + dz;
  sums->dot = fma(dz, centered, sums->dot);
}

// The smooth activations are bound by their arithmetic, and need the registers for it.
template <typename Act>
constexpr bool kCheap = Act::kPiecewiseLinear || __is_same(Act, Identity);

template <typename A>
BN_INLINE void add_wide(const Vec<A>& v, double* to, int lanes) {
  if (lanes == kLanes<A>) {
    for (int i = 0; i < kWideParts<A>; ++i) {
      poke(to + i * kWideLanes, peek<NativeDouble>(to + i * kWideLanes) + wide(v, i));
    }
  } else {
    A values[kLanes<A>];
    store(values, v);
    for (int i = 0; i < lanes; ++i) to[i] += static_cast<double>(values[i]);
  }
}

// kept: sum(dz) and sum(dz * (x - center)) of each column between groups.
template <typename T, typename Act, int kVectors, bool kPartial>
BN_INLINE void sums_of_block(const BackwardRows<T>& rows, const Block& b, Accumulate<T>* kept,
                             const ForwardParams<Accumulate<T>>& p, double* sum, double* dot) {
  using A = Accumulate<T>;
  const bool has_residual = rows.has_residual, has_mask = rows.has_mask;
  Affine<A> affine[kVectors];
  GradientSums<A> sums[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t at = b.at + v * kLanes<A>;
    affine[v] = affine_at<true>(p, at, b.lanes, kPartial);
    sums[v] = {set1(A(0)), set1(A(0))};
    if (b.begin > 0) sums[v] = {load(kept + at), load(kept + at + b.padded)};
  }
  for (int r = b.begin; r < b.end; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      add_gradient<T, Act, kPartial>(
          rows.x[r], rows.dy[r], has_residual ? rows.residual[r] : nullptr,
          has_mask ? rows.mask[r] : nullptr, b.at + v * kLanes<A>, b.lanes, affine[v],
          p.activation_param, &sums[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t at = b.at + v * kLanes<A>;
    if (b.end == b.count) {
      add_wide(sums[v].sum, sum + at, b.lanes);
      add_wide(sums[v].dot, dot + at, b.lanes);
    } else {
      store(kept + at, sums[v].sum);
      store(kept + at + b.padded, sums[v].dot);
    }
  }
}

template <typename T, typename Act>
static void column_sums(const BackwardRows<T>& rows, int count, std::int64_t cols,
                        Accumulate<T>* kept, const ForwardParams<Accumulate<T>>& p, double* sum,
                        double* dot) {
  constexpr int kLane = kLanes<Accumulate<T>>;
  constexpr int kVectors = kCheap<Act> ? kBlock : 1;
  const std::int64_t padded = (cols + kLane - 1) / kLane * kLane;
  const int group = group_rows<T>(cols, count);
  for (int begin = 0; begin < count; begin += group) {
    Block b{begin, begin + group < count ? begin + group : count, count, 0, padded, kLane};
    for (; b.at + kVectors * kLane <= cols; b.at += kVectors * kLane) {
      sums_of_block<T, Act, kVectors, false>(rows, b, kept, p, sum, dot);
    }
    if constexpr (kVectors > 1) {
      for (; b.at + kLane <= cols; b.at += kLane) {
        sums_of_block<T, Act, 1, false>(rows, b, kept, p, sum, dot);
      }
    }
    b.lanes = static_cast<int>(cols - b.at);
    if (b.lanes > 0) sums_of_block<T, Act, 1, true>(rows, b, kept, p, sum, dot);
  }
}

// One channel's run of length <= kRunLength.
template <typename T, typename Act>
static void run_sums(const BackwardSpan<T>& span, const ForwardParams<Accumulate<T>>& p,
                     double* sum, double* dot) {
  using A = Accumulate<T>;
  constexpr int kLane = kLanes<A>;
  constexpr int kVectors = kCheap<Act> ? 4 : 1;
  const BackwardSpan<T> s = span;
  const A param = p.activation_param;
  const Affine<A> affine = affine_at<false>(p, 0, 0, false);
  GradientSums<A> sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = {set1(A(0)), set1(A(0))};
  std::int64_t at = 0;
  for (; at + kVectors * kLane <= s.length; at += kVectors * kLane) {
    for (int v = 0; v < kVectors; ++v) {
      add_gradient<T, Act, false>(s.x, s.dy, s.residual, s.mask, at + v * kLane, kLane, affine,
                                  param, &sums[v]);
    }
  }
  for (; at + kLane <= s.length; at += kLane) {
    add_gradient<T, Act, false>(s.x, s.dy, s.residual, s.mask, at, kLane, affine, param, &sums[0]);
  }
  if (at < s.length) {
    add_gradient<T, Act, true>(s.x, s.dy, s.residual, s.mask, at, static_cast<int>(s.length - at),
                               affine, param, &sums[0]);
  }
  for (int v = 0; v < kVectors; ++v) {
    *sum += total(sums[v].sum);
    *dot += total(sums[v].dot);
  }
}

// ---- backward: dx = scale * (dz + (x - center) * slope + offset) ----

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
  const Vec<A> inner = p.slope ? dz + fma(slope, centered, offset) : dz;
  const Vec<A> dx = affine.scale * inner;
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
static void backward(const BackwardSpan<T>& span, const BackwardParams<Accumulate<T>>& params) {
  using A = Accumulate<T>;
  const BackwardSpan<T> s = span;
  const BackwardParams<A> p = params;
  const bool stream = s.stream && (!s.dx || is_aligned(s.dx)) &&
                      (!s.dresidual || is_aligned(s.dresidual));
  const Vec<A> zero = set1(A(0));
  const Affine<A> shared = affine_at<false>(p.forward, 0, 0, false);
  const Vec<A> shared_slope = p.slope ? set1(p.slope[0]) : zero;
  const Vec<A> shared_offset = p.slope ? set1(p.offset[0]) : zero;
  std::int64_t at = 0;
#pragma GCC unroll 4
  for (; at + kLanes<A> <= s.length; at += kLanes<A>) {
    __builtin_prefetch(s.x + at + s.ahead);
    __builtin_prefetch(s.dy + at + s.ahead);
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
  k.column_sums[i] = column_sums<T, Act>;
  k.run_sums[i] = run_sums<T, Act>;
  k.backward[i][Kernels<T>::kShared] = backward<T, Act, false>;
  k.backward[i][Kernels<T>::kPerColumn] = backward<T, Act, true>;
}

template <typename T>
constexpr Kernels<T> make_table() {
  Kernels<T> k{};
  k.column_moments = column_moments<T>;
  k.run_moments = run_moments<T>;
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
template const Kernels<BFloat16>& table<BFloat16>();
#if !BATCHNORM_HAS_BF16  // the other dtypes gain nothing from its instructions
template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();
template const Kernels<Half>& table<Half>();
#endif

#undef BN_INLINE
#undef BN_MEMBER
