// Mean and sum of squared deviations, of columns and of runs. Included like vec.h.

// Single pass, shifted: with K near the chunk's mean, d = x - K, mean = K + sum(d) / n and
// m2 = sum(d^2) - sum(d)^2 / n. K is the mean of the chunk's first k values; since those are part
// of the chunk, (K - mean)^2 <= variance * (n - k) / k whatever the data, so that the subtraction
// costs at most a factor n / k of the float32 rounding error (n / k <= 8 for columns, 16 for runs,
// but for short chunks). A constant chunk has d = 0 throughout. Chunks are combined in double
// (Chan, Golub & LeVeque 1979).

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
BN_INLINE void start_sums(const T* const* rows, const Block& b, ShiftedSums<Accumulate<T>>* sums) {
  using A = Accumulate<T>;
  const int head = b.count < kGroupRows ? b.count : kGroupRows;
  Vec<A> first[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    first[v] = load_at<T, kPartial>(rows[0], b, v);
    sums[v] = {set1(A(0)), set1(A(0)), set1(A(0))};
  }
  for (int r = 1; r < head; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[v].shift = sums[v].shift + (load_at<T, kPartial>(rows[r], b, v) - first[v]);
    }
  }
  const Vec<A> share = set1(A(1) / static_cast<A>(head));
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v].shift = fma(sums[v].shift, share, first[v]);
}

template <typename T, int kVectors, bool kPartial>
BN_INLINE void add_rows(const T* const* rows, const Block& b, ShiftedSums<Accumulate<T>>* sums) {
  using A = Accumulate<T>;
  for (int r = b.begin; r < b.end; ++r) {
#pragma GCC unroll 8
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
#pragma GCC unroll 8
  for (int i = 0; i < kWideParts<A>; ++i) {
    const auto shift = wide(sums.shift, i), sum = wide(sums.sum, i),
               squares = wide(sums.squares, i);
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
#pragma GCC unroll 8
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
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const A* const at = kept + b.at + v * kLanes<A>;
      sums[v] = {load(at), load(at + b.padded), load(at + 2 * b.padded)};
    }
  }
  add_rows<T, kVectors, kPartial>(rows, b, sums);
#pragma GCC unroll 8
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
static void column_moments(const T* const* rows, int count, std::int64_t cols, Accumulate<T>* kept,
                           double before, double* mean, double* m2) {
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

// K is shared by all lanes, so that the lanes' sums just add up.
template <typename T>
BN_INLINE Moments moments_of_run(const T* x, std::int64_t length) {
  using A = Accumulate<T>;
  constexpr int kLane = kLanes<A>;
  constexpr int kVectors = 4;
  const Vec<A> first = set1(static_cast<A>(to_double(x)));
  Vec<A> sum[kVectors], squares[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum[v] = squares[v] = set1(A(0));
  const std::int64_t head = length / 8 / kLane * kLane;
  for (std::int64_t at = 0; at < head; at += kLane) sum[0] = sum[0] + (load(x + at) - first);
  const double guess = head == 0 ? 0 : total(sum[0]) / static_cast<double>(head);
  const Vec<A> shift = first + set1(static_cast<A>(guess));
  sum[0] = set1(A(0));

  std::int64_t at = 0;
  for (; at + kVectors * kLane <= length; at += kVectors * kLane) {
#pragma GCC unroll 8
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

template <typename T>
static void run_moments(const T* x, std::int64_t length, std::int64_t runs, Moments* totals) {
  for (std::int64_t run = 0; run < runs; ++run) {
    totals[run] = combine(totals[run], moments_of_run(x + run * length, length));
  }
}
