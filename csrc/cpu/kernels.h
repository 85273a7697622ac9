// The vector kernels' interface: one table per storage dtype and instruction set.
//
// Everything above them (cpu/passes.h) is ordinary code that decides which rows a kernel sees.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/types.h"

namespace batchnorm {
namespace cpu {

// What one call of a reduction may take: rows of a matrix, or elements of a run. No float32 sum
// then is the result of more than 64 additions one after the other: of rows, or of kRunLength / 64
// vectors, 3 to join four of them, and kRunsKept runs.
constexpr int kChunkRows = 64;
constexpr int kRunLength = 2048;
constexpr int kRunsKept = 28;
// Rows, or elements of a run, whose mean the others are summed up as differences from.
constexpr int kHeadRows = 8;
constexpr int kHeadLength = 64;
// The sums of a run, before they are added up across lanes: two vectors of 64 bytes.
constexpr int kKeptBytes = 128;

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

// Forward: of d = scale * (x - K), sum(d) and sum(d^2). Backward: sum(dz) and sum(dz * (x -
// center)).
struct Sums {
  double first = 0;
  double second = 0;

  void operator+=(const Sums& other) {
    first += other.first;
    second += other.second;
  }
};

// K of each column, or of each run; scale is 1 but where squares overflow.
template <typename A>
struct Shift {
  const A* values;
  A scale;
};

template <typename T>
struct Kernels {
  using A = Accumulate<T>;
  enum Params { kShared = 0, kPerColumn = 1 };

  // The mean of each column's, or of each run's, first values.
  void (*column_heads)(const T* const* rows, int count, std::int64_t cols, A* heads);
  void (*run_heads)(const T* x, std::int64_t length, std::int64_t runs, A* heads);
  // Adds rows[0..count) to the sums of each column. They are walked in groups of `group` rows,
  // between which the sums are kept in `kept`: room for column_scratch(cols) values.
  void (*column_moments)(const T* const* rows, int count, std::int64_t cols, int group,
                         const Shift<A>&, A* kept, double* first, double* second);
  void (*column_sums[kActivations])(const BackwardRows<T>&, int count, std::int64_t cols, int group,
                                    const ForwardParams<A>&, A* kept, double* first,
                                    double* second);
  // Adds runs that follow each other, of length <= kRunLength, to the kept sums of each (dx and
  // dresidual are not written). kept: kKeptBytes for each run, aligned to a cache line.
  void (*run_moments)(const T* x, std::int64_t length, std::int64_t runs, const Shift<A>&, A* kept);
  void (*run_sums[kActivations])(const BackwardSpan<T>&, const ForwardParams<A>&, A* kept);
  // Adds what is kept to totals, and clears it.
  void (*add_kept)(A* kept, std::int64_t runs, Sums* totals);
  void (*forward[kActivations][2])(const ForwardSpan<T>&, const ForwardParams<A>&);
  void (*backward[kActivations][2])(const BackwardSpan<T>&, const BackwardParams<A>&);
};

inline std::int64_t column_scratch(std::int64_t cols) { return 2 * (cols + 16); }

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
