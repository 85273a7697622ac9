// 64 bytes of floats or doubles, in as many registers as the instruction set needs.
//
// Included once by each kernels_<isa>.cpp inside its namespace and its target region: no include
// guard, no standard headers (an inline function of theirs compiled here would carry this
// instruction set into the rest of the program). Functions are always inlined, but for those that
// are long and seldom or slow by themselves: they are one copy instead of hundreds to compile.

#define BN_INLINE static inline __attribute__((always_inline))
#define BN_OUTLINE static __attribute__((noinline))
// A loop of a few steps that compilers would make vectors of, in hundreds of places.
#define BN_KEEP_LOOP asm volatile("")
#define BN_MEMBER inline __attribute__((always_inline))
#define BN_LAMBDA __attribute__((always_inline))

// A value that a lambda's argument brings by its type.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

constexpr int kVectorBytes = 64;
constexpr int kNativeBytes = BATCHNORM_NATIVE_BYTES;
constexpr int kParts = kVectorBytes / kNativeBytes;

// A statement for each part of a vector, with i = 0, 1, ... Not a loop: it would be unrolled only
// after it was inlined everywhere, a quarter of the time to compile (docs/decisions/0013).
#define BN_PART(INDEX, i, ...) \
  {                            \
    constexpr int i = INDEX;   \
    __VA_ARGS__;               \
  }
#if BATCHNORM_NATIVE_BYTES == 64
#define BN_EACH_PART(i, ...) BN_PART(0, i, __VA_ARGS__)
#elif BATCHNORM_NATIVE_BYTES == 32
#define BN_EACH_PART(i, ...) BN_PART(0, i, __VA_ARGS__) BN_PART(1, i, __VA_ARGS__)
#else
#define BN_EACH_PART(i, ...) \
  BN_PART(0, i, __VA_ARGS__) \
  BN_PART(1, i, __VA_ARGS__) BN_PART(2, i, __VA_ARGS__) BN_PART(3, i, __VA_ARGS__)
#endif

// Loops over vectors are unrolled to about as many instructions on every instruction set. Four
// times on all took the portable kernels 60 s to compile instead of 38; their speed was not
// compared.
constexpr int kUnroll = kNativeBytes / 16;

typedef float NativeFloat __attribute__((vector_size(kNativeBytes)));
typedef double NativeDouble __attribute__((vector_size(kNativeBytes)));
typedef std::int32_t NativeInt32 __attribute__((vector_size(kNativeBytes)));
typedef std::int64_t NativeInt64 __attribute__((vector_size(kNativeBytes)));
typedef std::uint32_t NativeUint32 __attribute__((vector_size(kNativeBytes)));
typedef std::uint16_t NativeUint16 __attribute__((vector_size(kNativeBytes / 2)));

template <typename A>
struct NativeOf;
template <>
struct NativeOf<float> {
  using type = NativeFloat;
  using integers = NativeInt32;
  using integer = std::int32_t;
};
template <>
struct NativeOf<double> {
  using type = NativeDouble;
  using integers = NativeInt64;
  using integer = std::int64_t;
};

template <typename A>
struct Vec {
  typename NativeOf<A>::type part[kParts];
};
// A comparison's result: every bit of a lane set, or none.
template <typename A>
struct Lanes {
  typename NativeOf<A>::integers part[kParts];
};
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <typename A>
constexpr int kLanesPerPart = kNativeBytes / static_cast<int>(sizeof(A));

#define BN_OPERATOR(RESULT, OP)                                       \
  template <typename A>                                               \
  BN_INLINE RESULT<A> operator OP(const Vec<A>& a, const Vec<A>& b) { \
    RESULT<A> r;                                                      \
    BN_EACH_PART(i, r.part[i] = a.part[i] OP b.part[i]);              \
    return r;                                                         \
  }
BN_OPERATOR(Vec, +)
BN_OPERATOR(Vec, -)
BN_OPERATOR(Vec, *)
BN_OPERATOR(Vec, /)
BN_OPERATOR(Lanes, <=)
BN_OPERATOR(Lanes, <)
BN_OPERATOR(Lanes, >=)
BN_OPERATOR(Lanes, >)
BN_OPERATOR(Lanes, !=)
#undef BN_OPERATOR

template <typename A>
BN_INLINE Lanes<A> operator|(const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
  BN_EACH_PART(i, r.part[i] = a.part[i] | b.part[i]);
  return r;
}

template <typename A>
BN_INLINE Lanes<A> operator~(const Lanes<A>& a) {
  Lanes<A> r;
  BN_EACH_PART(i, r.part[i] = ~a.part[i]);
  return r;
}

template <typename A>
BN_INLINE Vec<A> set1(A value) {
  Vec<A> r;
  BN_EACH_PART(i, r.part[i] = value - typename NativeOf<A>::type{});
  return r;
}

// a where the lane is set, else b.
template <typename A>
BN_INLINE Vec<A> select(const Lanes<A>& lanes, const Vec<A>& a, const Vec<A>& b) {
  Vec<A> r;
  BN_EACH_PART(i, r.part[i] = lanes.part[i] ? a.part[i] : b.part[i]);
  return r;
}

// a * b + c: one rounding where the instruction set has it, two (never contracted) elsewhere.
#if BATCHNORM_NATIVE_BYTES == 64
BN_INLINE NativeFloat native_fma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return _mm512_fmadd_ps(a, b, c);
}
BN_INLINE NativeDouble native_fma(NativeDouble a, NativeDouble b, NativeDouble c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif BATCHNORM_NATIVE_BYTES == 32
BN_INLINE NativeFloat native_fma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return _mm256_fmadd_ps(a, b, c);
}
BN_INLINE NativeDouble native_fma(NativeDouble a, NativeDouble b, NativeDouble c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
template <typename N>
BN_INLINE N native_fma(N a, N b, N c) {
  return a * b + c;
}
#endif

template <typename A>
BN_INLINE Vec<A> fma(const Vec<A>& a, const Vec<A>& b, const Vec<A>& c) {
  Vec<A> r;
  BN_EACH_PART(i, r.part[i] = native_fma(a.part[i], b.part[i], c.part[i]));
  return r;
}

// One bit per lane, lane 0 lowest.
template <typename A>
BN_INLINE unsigned native_bits(typename NativeOf<A>::integers lanes) {
#if BATCHNORM_NATIVE_BYTES == 64
  return sizeof(A) == 4 ? _mm512_movepi32_mask((__m512i)lanes)
                        : _mm512_movepi64_mask((__m512i)lanes);
#elif BATCHNORM_NATIVE_BYTES == 32
  return static_cast<unsigned>(sizeof(A) == 4 ? _mm256_movemask_ps((__m256)lanes)
                                              : _mm256_movemask_pd((__m256d)lanes));
#elif defined(__SSE2__)
  return static_cast<unsigned>(sizeof(A) == 4 ? _mm_movemask_ps((__m128)lanes)
                                              : _mm_movemask_pd((__m128d)lanes));
#else
  unsigned bits = 0;
  for (int k = 0; k < kLanesPerPart<A>; ++k) bits |= (lanes[k] ? 1u : 0u) << k;
  return bits;
#endif
}
template <typename A>
BN_INLINE unsigned to_bits(const Lanes<A>& lanes) {
  unsigned bits = 0;
  BN_EACH_PART(i, bits |= native_bits<A>(lanes.part[i]) << (i * kLanesPerPart<A>));
  return bits;
}

template <typename A>
BN_INLINE typename NativeOf<A>::integers native_lanes(unsigned bits) {
  using Integers = typename NativeOf<A>::integers;
  using Integer = typename NativeOf<A>::integer;
  Integers bit_of_lane;
  for (int k = 0; k < kLanesPerPart<A>; ++k) bit_of_lane[k] = Integer{1} << k;
  return ((static_cast<Integer>(bits) - Integers{}) & bit_of_lane) != Integers{};
}
template <typename A>
BN_INLINE Lanes<A> from_bits(unsigned bits) {
  Lanes<A> r;
  BN_EACH_PART(i, r.part[i] = native_lanes<A>(bits >> (i * kLanesPerPart<A>)));
  return r;
}

template <typename A>
BN_INLINE bool any_not_finite(const Vec<A>& v) {
  const Vec<A> zero_or_nan = v - v;
  return to_bits(zero_or_nan != zero_or_nan) != 0;
}

// Unaligned access to N as it lies in memory.
template <typename N>
BN_INLINE N peek(const void* from) {
  N r;
  __builtin_memcpy(&r, from, sizeof(N));
  return r;
}
template <typename N>
BN_INLINE void poke(void* to, N value) {
  __builtin_memcpy(to, &value, sizeof(N));
}

// 16-bit types: a native vector of floats from and to half as many bytes.

// Zero-extend and truncate. As intrinsics, since compilers split __builtin_convertvector in two.
#if BATCHNORM_NATIVE_BYTES == 64
BN_INLINE NativeUint32 extend(NativeUint16 v) {
  return (NativeUint32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
}
BN_INLINE NativeUint16 truncate(NativeUint32 v) {
  return (NativeUint16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
}
#elif BATCHNORM_NATIVE_BYTES == 32
BN_INLINE NativeUint32 extend(NativeUint16 v) {
  return (NativeUint32)_mm256_cvtepu16_epi32((__m128i)v);
}
// The values fit 16 bits, so that saturation does nothing.
BN_INLINE NativeUint16 truncate(NativeUint32 v) {
  return (NativeUint16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v),
                                        _mm256_extracti128_si256((__m256i)v, 1));
}
#else
BN_INLINE NativeUint32 extend(NativeUint16 v) { return __builtin_convertvector(v, NativeUint32); }
BN_INLINE NativeUint16 truncate(NativeUint32 v) { return __builtin_convertvector(v, NativeUint16); }
#endif

BN_INLINE NativeFloat widen(NativeUint16 bits, BFloat16) {
  return (NativeFloat)(extend(bits) << 16);
}

#if BATCHNORM_HAS_BF16
// Rounds to nearest even too, but takes float32 denormals (below 1.2e-38) for zero.
BN_INLINE NativeUint16 narrow(NativeFloat value, BFloat16) {
  return (NativeUint16)_mm512_cvtneps_pbh(value);
}
#else
// To nearest even, in the upper half of each lane; the lower one is anything. A nan stays one: the
// lower half of its bits is zero, as in all that comes from 16 bits (and see for_kernels()).
BN_INLINE NativeUint32 rounded_above(NativeFloat value) {
  const NativeUint32 bits = (NativeUint32)value;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
BN_INLINE NativeUint16 narrow(NativeFloat value, BFloat16) {
  return truncate(rounded_above(value) >> 16);
}
#endif

#if BATCHNORM_NATIVE_BYTES == 64
BN_INLINE NativeFloat widen(NativeUint16 bits, Half) {
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
BN_INLINE NativeUint16 narrow(NativeFloat value, Half) {
  return (NativeUint16)_mm512_maskz_cvtps_ph(0xffff, value,
                                             _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif BATCHNORM_NATIVE_BYTES == 32
BN_INLINE NativeFloat widen(NativeUint16 bits, Half) { return _mm256_cvtph_ps((__m128i)bits); }
BN_INLINE NativeUint16 narrow(NativeFloat value, Half) {
  return (NativeUint16)_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else  // two dozen instructions each
BN_OUTLINE NativeFloat widen(NativeUint16 bits, Half) {
  const NativeUint32 wide = extend(bits);
  const NativeUint32 magnitude = (wide & 0x7fffu) << 13;
  // Times 2^112 moves the exponent's bias, and makes denormals normal.
  const NativeUint32 finite = (NativeUint32)((NativeFloat)magnitude * 0x1p112f);
  const NativeUint32 special = magnitude | 0x7f800000u;
  const NativeUint32 value = magnitude >= 0x0f800000u ? special : finite;
  return (NativeFloat)(value | ((wide & 0x8000u) << 16));
}
BN_OUTLINE NativeUint16 narrow(NativeFloat value, Half) {
  const NativeUint32 bits = (NativeUint32)value;
  const NativeUint32 magnitude = bits & 0x7fffffffu;
  // Below 2^-14: adding 0.5 leaves the denormal's bits, rounded, at the bottom.
  const NativeUint32 denormal = (NativeUint32)((NativeFloat)magnitude + 0.5f) - 0x3f000000u;
  const NativeUint32 even = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const NativeUint32 special =
      magnitude > 0x7f800000u ? 0x7e00u - NativeUint32{} : 0x7c00u - NativeUint32{};
  NativeUint32 half = magnitude < 0x38800000u ? denormal : even;
  half = magnitude >= 0x477ff000u ? special : half;  // 65520 and above round to infinity
  return truncate(half | ((bits >> 16) & 0x8000u));
}
#endif

template <typename T>
struct Memory;  // how a native vector of T's accumulate type lies in memory
template <>
struct Memory<float> {
  using type = NativeFloat;
  BN_INLINE NativeFloat from(type v) { return v; }
  BN_INLINE type to(NativeFloat v) { return v; }
};
template <>
struct Memory<double> {
  using type = NativeDouble;
  BN_INLINE NativeDouble from(type v) { return v; }
  BN_INLINE type to(NativeDouble v) { return v; }
};
template <>
struct Memory<BFloat16> {
  using type = NativeUint16;
  BN_INLINE NativeFloat from(type v) { return widen(v, BFloat16{}); }
  BN_INLINE type to(NativeFloat v) { return narrow(v, BFloat16{}); }
};
template <>
struct Memory<Half> {
  using type = NativeUint16;
  BN_INLINE NativeFloat from(type v) { return widen(v, Half{}); }
  BN_INLINE type to(NativeFloat v) { return narrow(v, Half{}); }
};

template <typename T>
BN_INLINE Vec<Accumulate<T>> load(const T* from) {
  constexpr int kStep = kLanesPerPart<Accumulate<T>>;
  Vec<Accumulate<T>> r;
  BN_EACH_PART(i, r.part[i] = Memory<T>::from(peek<typename Memory<T>::type>(from + i * kStep)));
  return r;
}

#if BATCHNORM_NATIVE_BYTES == 32
// Both parts of a vector at once: half the instructions, and one store.
BN_INLINE __m256i narrow(const Vec<float>& v, BFloat16) {
  // packus takes the quarters of both parts in turns.
  const __m256i quarters = _mm256_packus_epi32((__m256i)(rounded_above(v.part[0]) >> 16),
                                               (__m256i)(rounded_above(v.part[1]) >> 16));
  return _mm256_permute4x64_epi64(quarters, 0xd8);
}
#endif

// put(at, value) for what a vector is in memory: a native vector at element `at` each time.
template <typename T, typename Put>
BN_INLINE void put_each(const Vec<Accumulate<T>>& v, const Put& put) {
#if BATCHNORM_NATIVE_BYTES == 32
  if constexpr (__is_same(T, BFloat16)) return put(0, narrow(v, BFloat16{}));
#endif
  constexpr int kStep = kLanesPerPart<Accumulate<T>>;
  BN_EACH_PART(i, put(i * kStep, Memory<T>::to(v.part[i])));
}

template <typename T>
BN_INLINE void store(T* to, const Vec<Accumulate<T>>& v) {
  put_each<T>(v, [&](int at, auto value) BN_LAMBDA { poke(to + at, value); });
}

// Past the caches; to must be aligned to the bytes of a native vector as stored.
template <typename Native>
BN_INLINE void native_store_streaming(void* to, Native value) {
#if defined(__SSE2__)
  constexpr int kBytes = static_cast<int>(sizeof(value));
#if BATCHNORM_NATIVE_BYTES == 64
  if constexpr (kBytes == 64) _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
#endif
#if BATCHNORM_NATIVE_BYTES >= 32
  if constexpr (kBytes == 32) _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
#endif
  if constexpr (kBytes == 16) _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)value);
  if constexpr (kBytes == 8) _mm_stream_si64(static_cast<long long*>(to), (long long)value);
#else
  poke(to, value);
#endif
}
template <typename T>
BN_INLINE void store_streaming(T* to, const Vec<Accumulate<T>>& v) {
  put_each<T>(v, [&](int at, auto value) BN_LAMBDA { native_store_streaming(to + at, value); });
}

// What a run's last, incomplete vector needs: n < kLanes elements, zeros behind them. Nothing else
// is touched.
#if BATCHNORM_NATIVE_BYTES == 32
// All bits of the first n lanes of part i, of lanes as wide as Integers'.
template <typename Integers>
BN_INLINE Integers first_lanes_of_part(int n, int i) {
  constexpr int kLanesHere = sizeof(Integers) / sizeof(Integers{}[0]);
  Integers lane;
  for (int k = 0; k < kLanesHere; ++k) lane[k] = k;
  return (n - i * kLanesHere - Integers{}) > lane;
}
#endif

template <typename T>
BN_INLINE Vec<Accumulate<T>> load(const T* from, int n) {
  using A = Accumulate<T>;
  [[maybe_unused]] constexpr int kStep = kLanesPerPart<A>;
  Vec<A> r;
#if BATCHNORM_NATIVE_BYTES == 64
  const unsigned mask = (1u << n) - 1u;
  if constexpr (sizeof(T) == 4) {
    r.part[0] =
        (typename NativeOf<A>::type)_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
  } else if constexpr (sizeof(T) == 8) {
    r.part[0] =
        (typename NativeOf<A>::type)_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
  } else {
    r.part[0] =
        Memory<T>::from((NativeUint16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
  }
#elif BATCHNORM_NATIVE_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    BN_EACH_PART(i, r.part[i] = _mm256_maskload_ps(
                        from + i * kStep, (__m256i)first_lanes_of_part<NativeInt32>(n, i)));
  } else if constexpr (sizeof(T) == 8) {
    BN_EACH_PART(i, r.part[i] = _mm256_maskload_pd(
                        from + i * kStep, (__m256i)first_lanes_of_part<NativeInt64>(n, i)));
  } else {
    // By twos, and the last of an odd number by itself.
    const int* const twos = reinterpret_cast<const int*>(from);
    NativeInt32 bits = (NativeInt32)_mm256_maskload_epi32(
        twos, (__m256i)first_lanes_of_part<NativeInt32>(n / 2, 0));
    if (n % 2 != 0) {
      const NativeInt32 last = static_cast<int>(from[n - 1].bits) - NativeInt32{};
      bits |= last & (first_lanes_of_part<NativeInt32>(n / 2 + 1, 0) ^
                      first_lanes_of_part<NativeInt32>(n / 2, 0));
    }
    r.part[0] = Memory<T>::from((NativeUint16)_mm256_castsi256_si128((__m256i)bits));
    r.part[1] = Memory<T>::from((NativeUint16)_mm256_extracti128_si256((__m256i)bits, 1));
  }
#else
  T all[kLanes<A>] = {};
#pragma GCC unroll 1
  for (int i = 0; i < n; ++i) {
    all[i] = from[i];
    BN_KEEP_LOOP;
  }
  r = load(all);
#endif
  return r;
}

template <typename T>
BN_INLINE void store(T* to, const Vec<Accumulate<T>>& v, int n) {
#if BATCHNORM_NATIVE_BYTES == 64
  const unsigned mask = (1u << n) - 1u;
  const typename Memory<T>::type value = Memory<T>::to(v.part[0]);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), (__m512i)value);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), (__m512i)value);
  } else {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), (__m256i)value);
  }
#elif BATCHNORM_NATIVE_BYTES == 32
  constexpr int kStep = kLanesPerPart<Accumulate<T>>;
  if constexpr (sizeof(T) == 4) {
    BN_EACH_PART(
        i, _mm256_maskstore_ps(to + i * kStep, (__m256i)first_lanes_of_part<NativeInt32>(n, i),
                               v.part[i]));
  } else if constexpr (sizeof(T) == 8) {
    BN_EACH_PART(
        i, _mm256_maskstore_pd(to + i * kStep, (__m256i)first_lanes_of_part<NativeInt64>(n, i),
                               v.part[i]));
  } else {
    T all[kLanes<Accumulate<T>>];
    store(all, v);
    _mm256_maskstore_epi32(reinterpret_cast<int*>(to),
                           (__m256i)first_lanes_of_part<NativeInt32>(n / 2, 0), peek<__m256i>(all));
    if (n % 2 != 0) to[n - 1] = all[n - 1];
  }
#else
  T all[kLanes<Accumulate<T>>];
  store(all, v);
#pragma GCC unroll 1
  for (int i = 0; i < n; ++i) {
    to[i] = all[i];
    BN_KEEP_LOOP;
  }
#endif
}

// The value as it will be read back after a store.
template <typename T>
BN_INLINE Vec<Accumulate<T>> round_to(const Vec<Accumulate<T>>& v) {
  Vec<Accumulate<T>> r;
#if !BATCHNORM_HAS_BF16
  if constexpr (__is_same(T, BFloat16)) {
    BN_EACH_PART(i, r.part[i] = (NativeFloat)(rounded_above(v.part[i]) & 0xffff0000u));
    return r;
  }
#endif
  if constexpr (sizeof(T) == sizeof(Accumulate<T>)) return v;
  BN_EACH_PART(i, r.part[i] = Memory<T>::from(Memory<T>::to(v.part[i])));
  return r;
}

template <typename T>
BN_INLINE double to_double(const T* from) {
  typename Memory<T>::type first{};
  __builtin_memcpy(&first, from, sizeof(T));
  return static_cast<double>(Memory<T>::from(first)[0]);
}

// The first n lanes set.
template <typename A>
BN_INLINE Lanes<A> first_lanes(int n) {
  return from_bits<A>((1u << n) - 1u);
}

// Eight (four, two) doubles at a time: part i of kWideParts of a vector of A.
constexpr int kWideLanes = kNativeBytes / 8;
template <typename A>
constexpr int kWideParts = kLanes<A> / kWideLanes;

BN_INLINE NativeDouble wide(const Vec<double>& v, int i) { return v.part[i]; }
#if BATCHNORM_NATIVE_BYTES == 64
// Masked forms, since gcc 12 warns of the others' own uninitialised variables.
BN_INLINE NativeDouble wide(const Vec<float>& v, int i) {
  const __m256 half = i == 0 ? _mm512_maskz_extractf32x8_ps(0xff, v.part[0], 0)
                             : _mm512_maskz_extractf32x8_ps(0xff, v.part[0], 1);
  return _mm512_maskz_cvtps_pd(0xff, half);
}
#elif BATCHNORM_NATIVE_BYTES == 32
BN_INLINE NativeDouble wide(const Vec<float>& v, int i) {
  return _mm256_cvtps_pd(i % 2 == 0 ? _mm256_castps256_ps128(v.part[i / 2])
                                    : _mm256_extractf128_ps(v.part[i / 2], 1));
}
#else
BN_INLINE NativeDouble wide(const Vec<float>& v, int i) {
  typedef float HalfFloat __attribute__((vector_size(kNativeBytes / 2)));
  return __builtin_convertvector(
      peek<HalfFloat>(reinterpret_cast<const float*>(&v) + i * kWideLanes), NativeDouble);
}
#endif

#if BATCHNORM_NATIVE_BYTES >= 32
BN_INLINE double total_of_four(__m256d v) {
  const __m128d half = _mm256_castpd256_pd128(v) + _mm256_extractf128_pd(v, 1);
  return half[0] + half[1];
}
#endif
#if BATCHNORM_NATIVE_BYTES == 64
BN_INLINE double total(NativeDouble v) {
  return total_of_four(_mm512_maskz_extractf64x4_pd(0xf, v, 0) +
                       _mm512_maskz_extractf64x4_pd(0xf, v, 1));
}
#elif BATCHNORM_NATIVE_BYTES == 32
BN_INLINE double total(NativeDouble v) { return total_of_four(v); }
#else
BN_INLINE double total(NativeDouble v) { return v[0] + v[1]; }
#endif

// The lanes' sum, in a fixed order: halves onto each other.
template <typename A>
BN_INLINE double total(const Vec<A>& v) {
  NativeDouble sum = wide(v, 0);
#pragma GCC unroll 8
  for (int i = 1; i < kWideParts<A>; ++i) sum = sum + wide(v, i);
  return total(sum);
}
