// What is written element by element: y, and dx with the residual's gradient. Included like vec.h.

// The smooth activations are bound by their arithmetic, and need the registers for it.
template <typename Act>
constexpr bool kCheap = Act::kPiecewiseLinear || __is_same(Act, Identity);

// Where columns share a channel, and with it the parameters, those stay in registers. The smooth
// activations read them like those of columns, again and again from here: one kernel for both.
template <typename A>
struct Repeated {
  BN_MEMBER explicit Repeated(A value) { store(values, set1(value)); }
  A values[kLanes<A>];
};
// What column & step is: the column itself, or the first one always.
constexpr std::int64_t kEachColumn = -1, kOneColumn = 0;

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
BN_INLINE Affine<A> affine_at(const ForwardParams<A>& p, std::int64_t at, int lanes, bool partial) {
  return {parameter<kPerColumn>(p.center, at, lanes, partial),
          parameter<kPerColumn>(p.scale, at, lanes, partial),
          parameter<kPerColumn>(p.shift, at, lanes, partial)};
}

// z as the forward pass had it, to the last bit: the one place where it is computed.
template <typename T, typename Act>
BN_INLINE Vec<Accumulate<T>> pre_activation(const Vec<Accumulate<T>>& centered,
                                            const Affine<Accumulate<T>>& affine, const T* residual,
                                            int lanes, bool partial) {
  Vec<Accumulate<T>> z = fma(centered, affine.scale, affine.shift);
  if (residual) z = z + (partial ? load(residual, lanes) : load(residual));
  if constexpr (Act::kOfRounded) return round_to<T>(z);
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
    return select(Act::template drops<T>(z), Act::dropped(dy, param), dy);
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
    if (s.mask) write_bits<A>(s.mask, at, lanes, ~to_bits(Act::template drops<T>(z)));
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

template <typename A>
BN_INLINE ForwardParams<A> next_channel(const ForwardParams<A>& p) {
  return {p.center + 1, p.scale + 1, p.shift + 1, p.activation_param};
}

template <typename Pointer>
BN_INLINE Pointer advance(Pointer pointer, std::int64_t by) {
  return pointer ? pointer + by : pointer;
}

// Bytes of the mask that a run has of its own.
BN_INLINE std::int64_t mask_bytes(std::int64_t length) { return (length + 7) / 8; }

// Whether a run may end with a vector that reaches back over what is done already, the same once
// more: cheaper than a part of one. The mask's bits have to begin a byte.
template <typename A, typename Span>
BN_INLINE bool can_overlap(const Span& s) {
  return !s.mask && s.length >= kLanes<A>;
}

// s and p are copies, so that the compiler knows that no store changes them.
template <typename T, typename Act, bool kPerColumn>
BN_INLINE void forward_run(const ForwardSpan<T> s, const ForwardParams<Accumulate<T>> p,
                           std::int64_t step) {
  using A = Accumulate<T>;
  const bool stream = s.stream && is_aligned(s.y);
  const Affine<A> shared = affine_at<false>(p, 0, 0, false);
  std::int64_t at = 0;
#pragma GCC unroll kUnroll
  for (; at + kLanes<A> <= s.length; at += kLanes<A>) {
    const Affine<A> affine = kPerColumn ? affine_at<kPerColumn>(p, at & step, 0, false) : shared;
    if constexpr (kPerColumn) __builtin_prefetch(s.x + at + s.ahead);
    forward_vector<T, Act, false>(s, affine, p.activation_param, at, kLanes<A>, stream);
  }
  if (at == s.length) return;
  if (!kPerColumn && can_overlap<A>(s)) {
    forward_vector<T, Act, false>(s, shared, p.activation_param, s.length - kLanes<A>, kLanes<A>,
                                  false);
    return;
  }
  const int lanes = static_cast<int>(s.length - at);
  const Affine<A> affine = affine_at<kPerColumn>(p, at & step, lanes, true);
  forward_vector<T, Act, true>(s, affine, p.activation_param, at, lanes, false);
}

template <typename T, typename Act>
BN_OUTLINE void smooth_forward_run(const ForwardSpan<T>& s, const ForwardParams<Accumulate<T>>& p,
                                   std::int64_t step) {
  forward_run<T, Act, true>(s, p, step);
}

template <typename T, typename Act>
BN_INLINE void forward_run_of_channel(const ForwardSpan<T>& s,
                                      const ForwardParams<Accumulate<T>>& p) {
  if constexpr (kCheap<Act>) {
    forward_run<T, Act, false>(s, p, kOneColumn);
  } else {
    const Repeated center(p.center[0]), scale(p.scale[0]), shift(p.shift[0]);
    smooth_forward_run<T, Act>(s, {center.values, scale.values, shift.values, p.activation_param},
                               kOneColumn);
  }
}

// Parameters per column.
template <typename T, typename Act>
static void forward_columns(const ForwardSpan<T>& s, const ForwardParams<Accumulate<T>>& p) {
  if constexpr (kCheap<Act>) {
    forward_run<T, Act, true>(s, p, kEachColumn);
  } else {
    smooth_forward_run<T, Act>(s, p, kEachColumn);
  }
}

template <typename T, typename Act>
BN_INLINE void forward_each_channel(ForwardSpan<T> s, ForwardParams<Accumulate<T>> p) {
  for (std::int64_t run = 0; run < s.runs; ++run) {
    forward_run_of_channel<T, Act>(s, p);
    s.x += s.length;
    s.residual = advance(s.residual, s.length);
    s.y += s.length;
    s.mask = advance(s.mask, mask_bytes(s.length));
    p = next_channel(p);
  }
}

// Runs of which each has the next channel's. Most have nothing but x and y: code for them alone,
// which asks for nothing else at each vector, takes 0.8 of the time (float16, AVX2, in a cache).
template <typename T, typename Act>
static void forward_channels(const ForwardSpan<T>& s, const ForwardParams<Accumulate<T>>& p) {
  if (kCheap<Act> && !s.residual && !s.mask && !s.stream) {
    forward_each_channel<T, Act>({s.x, nullptr, s.y, nullptr, s.length, s.runs, 0, false}, p);
  } else {
    forward_each_channel<T, Act>(s, p);
  }
}

// ---- backward: dx = scale * (dz + (x - center) * slope + offset) ----

template <typename T, typename Act, bool kPerColumn, bool kPartial>
BN_INLINE void backward_vector(const BackwardSpan<T>& s, const BackwardParams<Accumulate<T>>& p,
                               const Affine<Accumulate<T>>& affine, Vec<Accumulate<T>> slope,
                               Vec<Accumulate<T>> offset, std::int64_t at, int lanes, bool stream) {
  using A = Accumulate<T>;
  const Vec<A> dy = kPartial ? load(s.dy + at, lanes) : load(s.dy + at);
  const Vec<A> x = kPartial ? load(s.x + at, lanes) : load(s.x + at);
  const Vec<A> centered = x - affine.center;
  const Vec<A> dz =
      activation_gradient<T, Act>(dy, centered, affine, s.residual ? s.residual + at : nullptr,
                                  s.mask, at, p.forward.activation_param, lanes, kPartial);
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
BN_INLINE void backward_run(const BackwardSpan<T> s, const BackwardParams<Accumulate<T>> p,
                            std::int64_t step) {
  using A = Accumulate<T>;
  const bool stream =
      s.stream && (!s.dx || is_aligned(s.dx)) && (!s.dresidual || is_aligned(s.dresidual));
  const Vec<A> zero = set1(A(0));
  const Affine<A> shared = affine_at<false>(p.forward, 0, 0, false);
  const Vec<A> shared_slope = p.slope ? set1(p.slope[0]) : zero;
  const Vec<A> shared_offset = p.slope ? set1(p.offset[0]) : zero;
  std::int64_t at = 0;
#pragma GCC unroll kUnroll
  for (; at + kLanes<A> <= s.length; at += kLanes<A>) {
    if constexpr (kPerColumn) {
      __builtin_prefetch(s.x + at + s.ahead);
      __builtin_prefetch(s.dy + at + s.ahead);
      const std::int64_t column = at & step;
      backward_vector<T, Act, true, false>(s, p, affine_at<true>(p.forward, column, 0, false),
                                           p.slope ? load(p.slope + column) : zero,
                                           p.slope ? load(p.offset + column) : zero, at, kLanes<A>,
                                           stream);
    } else {
      backward_vector<T, Act, false, false>(s, p, shared, shared_slope, shared_offset, at,
                                            kLanes<A>, stream);
    }
  }
  if (at == s.length) return;
  if (!kPerColumn && can_overlap<A>(s)) {
    backward_vector<T, Act, false, false>(s, p, shared, shared_slope, shared_offset,
                                          s.length - kLanes<A>, kLanes<A>, false);
    return;
  }
  const int lanes = static_cast<int>(s.length - at);
  const std::int64_t column = at & step;
  backward_vector<T, Act, kPerColumn, true>(
      s, p, affine_at<kPerColumn>(p.forward, column, lanes, true),
      p.slope ? parameter<kPerColumn>(p.slope, column, lanes, true) : zero,
      p.slope ? parameter<kPerColumn>(p.offset, column, lanes, true) : zero, at, lanes, false);
}

template <typename T, typename Act>
BN_OUTLINE void smooth_backward_run(const BackwardSpan<T>& s,
                                    const BackwardParams<Accumulate<T>>& p, std::int64_t step) {
  backward_run<T, Act, true>(s, p, step);
}

template <typename T, typename Act>
BN_INLINE void backward_run_of_channel(const BackwardSpan<T>& s,
                                       const BackwardParams<Accumulate<T>>& p) {
  using A = Accumulate<T>;
  if constexpr (kCheap<Act>) {
    backward_run<T, Act, false>(s, p, kOneColumn);
  } else {
    const ForwardParams<A>& f = p.forward;
    const Repeated center(f.center[0]), scale(f.scale[0]), shift(f.shift[0]);
    const Repeated slope(p.slope ? p.slope[0] : A(0)), offset(p.slope ? p.offset[0] : A(0));
    smooth_backward_run<T, Act>(s,
                                {{center.values, scale.values, shift.values, f.activation_param},
                                 p.slope ? slope.values : nullptr,
                                 offset.values},
                                kOneColumn);
  }
}

template <typename T, typename Act>
static void backward_columns(const BackwardSpan<T>& s, const BackwardParams<Accumulate<T>>& p) {
  if constexpr (kCheap<Act>) {
    backward_run<T, Act, true>(s, p, kEachColumn);
  } else {
    smooth_backward_run<T, Act>(s, p, kEachColumn);
  }
}

template <typename T, typename Act>
BN_INLINE void backward_each_channel(BackwardSpan<T> s, BackwardParams<Accumulate<T>> p) {
  for (std::int64_t run = 0; run < s.runs; ++run) {
    backward_run_of_channel<T, Act>(s, p);
    s.x += s.length;
    s.dy += s.length;
    s.residual = advance(s.residual, s.length);
    s.mask = advance(s.mask, mask_bytes(s.length));
    s.dx = advance(s.dx, s.length);
    s.dresidual = advance(s.dresidual, s.length);
    p.forward = next_channel(p.forward);
    p.slope = advance(p.slope, 1);
    p.offset = advance(p.offset, 1);
  }
}

template <typename T, typename Act>
static void backward_channels(const BackwardSpan<T>& s, const BackwardParams<Accumulate<T>>& p) {
  const bool plain = p.slope && s.dx && !s.dresidual && !s.residual && !s.mask && !s.stream;
  if (kCheap<Act> && plain) {
    backward_each_channel<T, Act>(
        {s.x, s.dy, nullptr, nullptr, s.dx, nullptr, s.length, s.runs, 0, false}, p);
  } else {
    backward_each_channel<T, Act>(s, p);
  }
}
