// What backward reduces: sum(dz) and sum(dz * (x - center)), of columns and of runs. Included like
// vec.h, after moments.h (how rows are walked) and elementwise.h (how dz is computed).

// known: lanes of a whole vector that are in the sums already, or null.
template <typename T, typename Act, bool kPartial>
BN_INLINE void add_gradient(const T* x, const T* dy, const T* residual, const std::uint8_t* mask,
                            std::int64_t at, int lanes, const Affine<Accumulate<T>>& affine,
                            Accumulate<T> param, PartialSums<Accumulate<T>>* sums,
                            const Lanes<Accumulate<T>>* known = nullptr) {
  using A = Accumulate<T>;
  const Vec<A> dy_here = load_some<kPartial>(dy + at, lanes);
  Vec<A> centered = load_some<kPartial>(x + at, lanes) - affine.center;
  Vec<A> dz =
      activation_gradient<T, Act>(dy_here, centered, affine, residual ? residual + at : nullptr,
                                  mask, at, param, lanes, kPartial);
  if constexpr (kPartial) {
    dz = select(first_lanes<A>(lanes), dz, set1(A(0)));
    centered = select(first_lanes<A>(lanes), centered, set1(A(0)));
  }
  if (known) {
    dz = select(*known, set1(A(0)), dz);
    centered = select(*known, set1(A(0)), centered);
  }
  sums->first = sums->first + dz;
  sums->second = fma(dz, centered, sums->second);
}

template <typename T, typename Act>
static void column_sums(const BackwardRows<T>& rows, int count, std::int64_t cols, int group,
                        const ForwardParams<Accumulate<T>>& p, Accumulate<T>* kept, double* first,
                        double* second) {
  using A = Accumulate<T>;
  constexpr int kMost = kCheap<Act> ? kBlock : 1;
  const bool has_residual = rows.has_residual, has_mask = rows.has_mask;
  for_each_block<kMost, A>(
      count, cols, group, [&](const Block& b, auto vectors, auto partial) BN_LAMBDA {
        constexpr int kVectors = vectors.value;
        constexpr bool kPartial = partial.value;
        Affine<A> affine[kVectors];
        PartialSums<A> sums[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          affine[v] = affine_at<true>(p, b.at + v * kLanes<A>, b.lanes, kPartial);
          sums[v] = resume(kept, b, v);
        }
        for (int r = b.begin; r < b.end; ++r) {
          const T* const residual = has_residual ? rows.residual[r] : nullptr;
          const std::uint8_t* const mask = has_mask ? rows.mask[r] : nullptr;
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            add_gradient<T, Act, kPartial>(rows.x[r], rows.dy[r], residual, mask,
                                           b.at + v * kLanes<A>, b.lanes, affine[v],
                                           p.activation_param, &sums[v]);
          }
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) suspend(sums[v], kept, b, v, first, second);
      });
}

template <typename T, typename Act>
static void run_sums(const BackwardSpan<T>& span, const ForwardParams<Accumulate<T>>& params,
                     Accumulate<T>* kept) {
  using A = Accumulate<T>;
  constexpr int kVectors = kCheap<Act> ? 4 : 1;
  BackwardSpan<T> s = span;
  ForwardParams<A> p = params;
  const Lanes<A> known = lanes_before<A>(s.length);
  for (std::int64_t run = 0; run < span.runs; ++run) {
    const Affine<A> affine = affine_at<false>(p, 0, 0, false);
    const auto sums = sums_of_run<kVectors, A>(
        s.length, [&](PartialSums<A>* sum, std::int64_t at, int lanes, auto partial) BN_LAMBDA {
          if (partial.value && can_overlap<A>(s)) {
            add_gradient<T, Act, false>(s.x, s.dy, s.residual, s.mask, s.length - kLanes<A>,
                                        kLanes<A>, affine, p.activation_param, sum, &known);
          } else {
            add_gradient<T, Act, partial.value>(s.x, s.dy, s.residual, s.mask, at, lanes, affine,
                                                p.activation_param, sum);
          }
        });
    keep(sums, kept);
    kept += 2 * kLanes<A>;
    s.x += s.length;
    s.dy += s.length;
    s.residual = advance(s.residual, s.length);
    s.mask = advance(s.mask, mask_bytes(s.length));
    p = next_channel(p);
  }
}
