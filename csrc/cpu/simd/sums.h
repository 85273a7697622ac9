// What backward reduces: sum(dz) and sum(dz * (x - center)), of columns and of runs. Included like
// vec.h, after moments.h (how rows are walked) and elementwise.h (how dz is computed).

template <typename A>
struct PartialSums {
  Vec<A> sum, dot;
};

template <typename T, typename Act, bool kPartial>
BN_INLINE void add_gradient(const T* x, const T* dy, const T* residual, const std::uint8_t* mask,
                            std::int64_t at, int lanes, const Affine<Accumulate<T>>& affine,
                            Accumulate<T> param, PartialSums<Accumulate<T>>* sums) {
  using A = Accumulate<T>;
  const Vec<A> x_here = kPartial ? load(x + at, lanes) : load(x + at);
  const Vec<A> dy_here = kPartial ? load(dy + at, lanes) : load(dy + at);
  Vec<A> centered = x_here - affine.center;
  Vec<A> dz =
      activation_gradient<T, Act>(dy_here, centered, affine, residual ? residual + at : nullptr,
                                  mask, at, param, lanes, kPartial);
  if constexpr (kPartial) {
    dz = select(first_lanes<A>(lanes), dz, set1(A(0)));
    centered = select(first_lanes<A>(lanes), centered, set1(A(0)));
  }
  sums->sum = sums->sum + dz;
  sums->dot = fma(dz, centered, sums->dot);
}

template <typename A>
BN_INLINE void add_wide(const Vec<A>& v, double* to, int lanes) {
  if (lanes == kLanes<A>) {
#pragma GCC unroll 8
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
  PartialSums<A> sums[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t at = b.at + v * kLanes<A>;
    affine[v] = affine_at<true>(p, at, b.lanes, kPartial);
    sums[v] = {set1(A(0)), set1(A(0))};
    if (b.begin > 0) sums[v] = {load(kept + at), load(kept + at + b.padded)};
  }
  for (int r = b.begin; r < b.end; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      add_gradient<T, Act, kPartial>(rows.x[r], rows.dy[r],
                                     has_residual ? rows.residual[r] : nullptr,
                                     has_mask ? rows.mask[r] : nullptr, b.at + v * kLanes<A>,
                                     b.lanes, affine[v], p.activation_param, &sums[v]);
    }
  }
#pragma GCC unroll 8
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

template <typename T, typename Act>
BN_INLINE void sums_of_run(const BackwardSpan<T>& s, const ForwardParams<Accumulate<T>>& p,
                           GradientSums* total_of_run) {
  using A = Accumulate<T>;
  constexpr int kLane = kLanes<A>;
  constexpr int kVectors = kCheap<Act> ? 4 : 1;
  const A param = p.activation_param;
  const Affine<A> affine = affine_at<false>(p, 0, 0, false);
  PartialSums<A> sums[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] = {set1(A(0)), set1(A(0))};
  std::int64_t at = 0;
  for (; at + kVectors * kLane <= s.length; at += kVectors * kLane) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      add_gradient<T, Act, false>(s.x, s.dy, s.residual, s.mask, at + v * kLane, kLane, affine,
                                  param, &sums[v]);
    }
  }
  if constexpr (kVectors > 1) {
    for (; at + kLane <= s.length; at += kLane) {
      add_gradient<T, Act, false>(s.x, s.dy, s.residual, s.mask, at, kLane, affine, param,
                                  &sums[0]);
    }
  }
  if (at < s.length) {
    add_gradient<T, Act, true>(s.x, s.dy, s.residual, s.mask, at, static_cast<int>(s.length - at),
                               affine, param, &sums[0]);
  }
  if constexpr (kVectors == 4) {
    sums[0].sum = (sums[0].sum + sums[1].sum) + (sums[2].sum + sums[3].sum);
    sums[0].dot = (sums[0].dot + sums[1].dot) + (sums[2].dot + sums[3].dot);
  }
  total_of_run->dz += total(sums[0].sum);
  total_of_run->dz_centered += total(sums[0].dot);
}

template <typename T, typename Act>
static void run_sums(const BackwardSpan<T>& span, const ForwardParams<Accumulate<T>>& params,
                     GradientSums* totals) {
  BackwardSpan<T> s = span;
  ForwardParams<Accumulate<T>> p = params;
  for (std::int64_t run = 0; run < span.runs; ++run) {
    sums_of_run<T, Act>(s, p, totals + run);
    s.x += s.length;
    s.dy += s.length;
    s.residual = advance(s.residual, s.length);
    s.mask = advance(s.mask, mask_bytes(s.length));
    p = next_channel(p);
  }
}
