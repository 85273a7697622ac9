// The vector kernels' interface: one table per storage dtype and instruction set.
//
// Everything above them (cpu/passes.h) is ordinary code that decides which rows a kernel sees.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/moments.h"
#include "core/types.h"

namespace batchnorm {
namespace cpu {

// What one call of a reduction may take: rows of a matrix, or elements of a run. Each float32
// partial sum then has at most this many (kRunLength / 64) terms.
constexpr int kChunkRows = 64;
constexpr int kRunLength = 4096;

// z = (x - center) * scale + shift [+ residual]. center is the mean rounded to the accumulate
// type and shift carries what the rounding lost, so x - center loses nothing.
// Arrays have one entry per column, or a single one where all columns share a channel.
template <typename A>
struct ForwardParams {
  const A* center;
  const A* scale;
  const A* shift;
  A activation_param;
};

// dx = scale * (dz + (x - center) * slope + offset); slope and offset are null in eval mode.
template <typename A>
struct BackwardParams {
  ForwardParams<A> forward;
  const A* slope;
  const A* offset;
};

// Runs of elements that follow each other in memory. Where columns share a channel there may be
// several, and each has the next channel's parameters and starts a new byte of the mask; with
// parameters per column there is one.
template <typename T>
struct ForwardSpan {
  const T* x;
  const T* residual;  // or null
  T* y;
  std::uint8_t* mask;   // or null; bit i % 8 of byte i / 8 belongs to element i
  std::int64_t length;  // of each run
  std::int64_t runs;
  std::int64_t ahead;  // elements from here to the span that comes next, to be prefetched; 0: none
  bool stream;         // store past the caches
};

template <typename T>
struct BackwardSpan {
  const T* x;
  const T* dy;
  const T* residual;         // or null
  const std::uint8_t* mask;  // or null: recompute z
  T* dx;                     // or null
  T* dresidual;              // or null
  std::int64_t length;
  std::int64_t runs;
  std::int64_t ahead;
  bool stream;
};

// The same columns of several rows.
template <typename T>
struct BackwardRows {
  const T* x[kChunkRows];
  const T* dy[kChunkRows];
  const T* residual[kChunkRows];
  const std::uint8_t* mask[kChunkRows];
  bool has_residual;
  bool has_mask;
};

struct GradientSums {
  double dz = 0;           // sum(dz)
  double dz_centered = 0;  // sum(dz * (x - center))
};

template <typename T>
struct Kernels {
  using A = Accumulate<T>;
  enum Params { kShared = 0, kPerColumn = 1 };

  // Adds rows[0..count) to the moments of each column; before = rows that mean and m2 hold.
  // kept: room for column_scratch(cols) values.
  void (*column_moments)(const T* const* rows, int count, std::int64_t cols, A* kept, double before,
                         double* mean, double* m2);
  // Adds the moments of runs that follow each other, of length <= kRunLength, to one total each.
  void (*run_moments)(const T* x, std::int64_t length, std::int64_t runs, Moments* totals);
  void (*forward[kActivations][2])(const ForwardSpan<T>&, const ForwardParams<A>&);
  // Adds sum(dz) and sum(dz * (x - center)): of each column, or of each run of length <= kRunLength
  // to its total (dx and dresidual are not written).
  void (*column_sums[kActivations])(const BackwardRows<T>&, int count, std::int64_t cols, A* kept,
                                    const ForwardParams<A>&, double* sum, double* dot);
  void (*run_sums[kActivations])(const BackwardSpan<T>&, const ForwardParams<A>&,
                                 GradientSums* totals);
  void (*backward[kActivations][2])(const BackwardSpan<T>&, const BackwardParams<A>&);
};

inline std::int64_t column_scratch(std::int64_t cols) { return 3 * (cols + 16); }

enum class Capability : std::uint8_t { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

constexpr const char* kCapabilityNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
constexpr int kCapabilities = 4;

// Built in for this processor family, and offered by the processor at hand.
bool is_built(Capability);
bool is_available(Capability);

// The best available one unless set; set_capability returns false where it is not available.
Capability capability();
bool set_capability(Capability);

// The table for capability().
template <typename T>
const Kernels<T>& kernels();

}  // namespace cpu
}  // namespace batchnorm
