// The kernels, written once for every instruction set and dtype.
//
// Each kernels_<isa>.cpp includes this inside its namespace and its target region, after
// cpu/kernels.h and the intrinsics. What a kernel must see in memory: nothing beyond the elements
// named in its arguments; any alignment, except where a span asks for streaming stores.

// clang-format off: each needs what stands above it
#include "cpu/simd/vec.h"
#include "cpu/simd/activations.h"
#include "cpu/simd/elementwise.h"
#include "cpu/simd/moments.h"
#include "cpu/simd/sums.h"
// clang-format on

// ---- the table ----

template <typename T, typename Act>
constexpr void fill(Kernels<T>& k, Activation activation) {
  const int i = static_cast<int>(activation);
  k.forward[i][Kernels<T>::kShared] = forward_channels<T, Act>;
  k.forward[i][Kernels<T>::kPerColumn] = forward_columns<T, Act>;
  k.column_sums[i] = column_sums<T, Act>;
  k.run_sums[i] = run_sums<T, Act>;
  k.backward[i][Kernels<T>::kShared] = backward_channels<T, Act>;
  k.backward[i][Kernels<T>::kPerColumn] = backward_columns<T, Act>;
}

template <typename T>
constexpr Kernels<T> make_table() {
  Kernels<T> k{};
  k.column_heads = column_heads<T>;
  k.run_heads = run_heads<T>;
  k.column_moments = column_moments<T>;
  k.run_moments = run_moments<T>;
  k.add_kept = add_kept<Accumulate<T>>;
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

#undef BN_EACH_PART
#undef BN_PART
#undef BN_INLINE
#undef BN_OUTLINE
#undef BN_KEEP_LOOP
#undef BN_MEMBER
#undef BN_LAMBDA
