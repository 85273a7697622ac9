// The sums that mean and variance are made of, of columns and of runs. Included like vec.h.

// With d = x - K, mean = K + sum(d) / n and m2 = sum(d^2) - sum(d)^2 / n. K is near the mean: it is
// that of some values, or where that was not near enough, of all (docs/decisions/0002). It is the
// same for all rows and runs of a channel, so that their sums just add up. A constant channel has
// d = 0 throughout.

template <typename A>
struct PartialSums {
  Vec<A> first, second;
};

template <typename A>
BN_INLINE PartialSums<A> no_sums() {
  return {set1(A(0)), set1(A(0))};
}

template <typename A>
BN_INLINE PartialSums<A> operator+(const PartialSums<A>& a, const PartialSums<A>& b) {
  return {a.first + b.first, a.second + b.second};
}

// ---- columns ----

// Columns side by side, for independent chains of sums: enough to hide an addition's latency.
constexpr int kBlock = kParts == 1 ? 4 : kParts == 2 ? 2 : 1;

// What a reduction sees of the rows: [begin, end) of the chunk's count, at these columns.
struct Block {
  int begin, end, count;
  std::int64_t at, padded;  // padded: distance between kinds of sums in the scratch memory
  int lanes;

  bool is_last() const { return end == count; }
};

// Calls visit(block, vectors, partial) for a chunk's rows in groups, kVectors vectors of columns at
// a time as far as they go; vectors and partial by their types.
template <int kVectors, typename A, typename Visit>
BN_INLINE void for_each_block(int count, std::int64_t cols, int group, const Visit& visit) {
  constexpr int kLane = kLanes<A>;
  const std::int64_t padded = (cols + kLane - 1) / kLane * kLane;
  for (int begin = 0; begin < count; begin += group) {
    Block b{begin, begin + group < count ? begin + group : count, count, 0, padded, kLane};
    for (; b.at + kVectors * kLane <= cols; b.at += kVectors * kLane) {
      visit(b, Constant<kVectors>{}, Constant<false>{});
    }
    if constexpr (kVectors > 1) {
      for (; b.at + kLane <= cols; b.at += kLane) visit(b, Constant<1>{}, Constant<false>{});
    }
    b.lanes = static_cast<int>(cols - b.at);
    if (b.lanes > 0) visit(b, Constant<1>{}, Constant<true>{});
  }
}

template <bool kPartial, typename T>
BN_INLINE Vec<Accumulate<T>> load_some(const T* from, int lanes) {
  if constexpr (kPartial) return load(from, lanes);
  return load(from);
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

// The sums of a vector of columns between groups: in `kept`, and at the chunk's end in the totals.
template <typename A>
BN_INLINE PartialSums<A> resume(const A* kept, const Block& b, int v) {
  if (b.begin == 0) return no_sums<A>();
  const A* const at = kept + b.at + v * kLanes<A>;
  return {load(at), load(at + b.padded)};
}
template <typename A>
BN_INLINE void suspend(const PartialSums<A>& sums, A* kept, const Block& b, int v, double* first,
                       double* second) {
  const std::int64_t at = b.at + v * kLanes<A>;
  if (b.is_last()) {
    add_wide(sums.first, first + at, b.lanes);
    add_wide(sums.second, second + at, b.lanes);
  } else {
    store(kept + at, sums.first);
    store(kept + at + b.padded, sums.second);
  }
}

template <typename T>
static void column_moments(const T* const* rows, int count, std::int64_t cols, int group,
                           const Shift<Accumulate<T>>& shift, Accumulate<T>* kept, double* first,
                           double* second) {
  using A = Accumulate<T>;
  const Vec<A> scale = set1(shift.scale);
  for_each_block<kBlock, A>(
      count, cols, group, [&](const Block& b, auto vectors, auto partial) BN_LAMBDA {
        constexpr int kVectors = vectors.value;
        constexpr bool kPartial = partial.value;
        Vec<A> origin[kVectors];
        PartialSums<A> sums[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const Vec<A> k = load_some<kPartial>(shift.values + b.at + v * kLanes<A>, b.lanes);
          origin[v] = set1(A(0)) - k * scale;
          sums[v] = resume(kept, b, v);
        }
        for (int r = b.begin; r < b.end; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            const Vec<A> x = load_some<kPartial>(rows[r] + b.at + v * kLanes<A>, b.lanes);
            const Vec<A> d = fma(x, scale, origin[v]);
            sums[v].first = sums[v].first + d;
            sums[v].second = fma(d, d, sums[v].second);
          }
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) suspend(sums[v], kept, b, v, first, second);
      });
}

// As the first value and the mean of differences from it: of equal values it is that value.
template <typename T>
static void column_heads(const T* const* rows, int count, std::int64_t cols, Accumulate<T>* heads) {
  using A = Accumulate<T>;
  const Vec<A> share = set1(A(1) / static_cast<A>(count));
  for_each_block<1, A>(count, cols, count, [&](const Block& b, auto, auto partial) BN_LAMBDA {
    constexpr bool kPartial = partial.value;
    const Vec<A> first = load_some<kPartial>(rows[0] + b.at, b.lanes);
    Vec<A> sum = set1(A(0));
    for (int r = 1; r < count; ++r) {
      sum = sum + (load_some<kPartial>(rows[r] + b.at, b.lanes) - first);
    }
    const Vec<A> head = fma(sum, share, first);
    if constexpr (kPartial) {
      store(heads + b.at, head, b.lanes);
    } else {
      store(heads + b.at, head);
    }
  });
}

// ---- runs ----

// Calls visit(sums, at, lanes, partial) for each vector of a run, kVectors sums in turn, and
// returns their sum.
template <int kVectors, typename A, typename Visit>
BN_INLINE PartialSums<A> sums_of_run(std::int64_t length, const Visit& visit) {
  constexpr int kLane = kLanes<A>;
  PartialSums<A> sums[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] = no_sums<A>();
  std::int64_t at = 0;
  for (; at + kVectors * kLane <= length; at += kVectors * kLane) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) visit(&sums[v], at + v * kLane, kLane, Constant<false>{});
  }
  if constexpr (kVectors > 1) {
    for (; at + kLane <= length; at += kLane) visit(&sums[0], at, kLane, Constant<false>{});
  }
  if (at < length) {
    visit(&sums[kVectors - 1], at, static_cast<int>(length - at), Constant<true>{});
  }
  if constexpr (kVectors == 4) return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sums[0];
}

// Of a run's last whole vector, the lanes that the one before has too.
template <typename A>
BN_INLINE Lanes<A> lanes_before(std::int64_t length) {
  return first_lanes<A>(kLanes<A> - static_cast<int>(length % kLanes<A>));
}

template <typename A>
BN_INLINE void keep(const PartialSums<A>& sums, A* kept) {
  store(kept, load(kept) + sums.first);
  store(kept + kLanes<A>, load(kept + kLanes<A>) + sums.second);
}

template <typename A>
static void add_kept(A* kept, std::int64_t runs, Sums* totals) {
  for (std::int64_t run = 0; run < runs; ++run, kept += 2 * kLanes<A>) {
    totals[run].first += total(load(kept));
    totals[run].second += total(load(kept + kLanes<A>));
    store(kept, set1(A(0)));
    store(kept + kLanes<A>, set1(A(0)));
  }
}

template <typename T>
static void run_moments(const T* x, std::int64_t length, std::int64_t runs,
                        const Shift<Accumulate<T>>& shift, Accumulate<T>* kept) {
  using A = Accumulate<T>;
  const Vec<A> scale = set1(shift.scale);
  const Lanes<A> known = lanes_before<A>(length);
  for (std::int64_t run = 0; run < runs; ++run, x += length, kept += 2 * kLanes<A>) {
    const Vec<A> origin = set1(-shift.values[run] * shift.scale);
    const auto sums = sums_of_run<4, A>(
        length, [&](PartialSums<A>* sum, std::int64_t at, int lanes, auto partial) BN_LAMBDA {
          constexpr bool kPartial = partial.value;
          Vec<A> d;
          if (kPartial && length >= kLanes<A>) {  // cheaper than a part of a vector
            d = fma(load(x + length - kLanes<A>), scale, origin);
            d = select(known, set1(A(0)), d);
          } else {
            d = fma(load_some<kPartial>(x + at, lanes), scale, origin);
            if constexpr (kPartial) d = select(first_lanes<A>(lanes), d, set1(A(0)));
          }
          sum->first = sum->first + d;
          sum->second = fma(d, d, sum->second);
        });
    keep(sums, kept);
  }
}

template <typename T>
static void run_heads(const T* x, std::int64_t length, std::int64_t runs, Accumulate<T>* heads) {
  using A = Accumulate<T>;
  constexpr int kLane = kLanes<A>;
  for (std::int64_t run = 0; run < runs; ++run, x += length) {
    const A first = static_cast<A>(to_double(x));
    Vec<A> sum = set1(A(0));
    std::int64_t count = 0;
    for (; count + kLane <= length && count < kHeadLength; count += kLane) {
      sum = sum + (load(x + count) - set1(first));
    }
    if (count == 0) {
      count = length;
      const int lanes = static_cast<int>(length);
      sum = select(first_lanes<A>(lanes), load(x, lanes) - set1(first), sum);
    }
    heads[run] = first + static_cast<A>(total(sum) / static_cast<double>(count));
  }
}
