// Walks a problem in the units of its plan: which rows and runs of elements the kernels see.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "core/moments.h"
#include "core/plan.h"
#include "cpu/batchnorm.h"
#include "cpu/kernels.h"

namespace batchnorm {
namespace cpu {

struct Channels {
  std::int64_t begin, end;
  std::int64_t count() const { return end - begin; }
};

// A share of a unit's rows: part index of count.
struct Part {
  std::int64_t index, count;
  std::int64_t begin(std::int64_t rows) const { return rows * index / count; }
  std::int64_t end(std::int64_t rows) const { return rows * (index + 1) / count; }
  bool is_last() const { return index + 1 == count; }
};

// Rows of `cols` contiguous elements, `stride` elements apart; their mask bits, in bytes, likewise.
struct Matrix {
  std::int64_t offset, rows, stride, cols;
  std::int64_t mask_offset, mask_stride;
};

// A contiguous run of elements, the byte of its first mask bit, and (Scheme::kPlanes) its channel.
// It may stand for `count` runs that follow each other, each of the next channel.
struct Run {
  std::int64_t offset, mask, length, channel, count;
  std::int64_t ahead;  // where the next one starts, from here; 0 where there is none
};

// What the kernels see of a unit's channels: a matrix whose columns belong to channels, or
// (Scheme::kPlanes) runs of one channel.
class Geometry {
 public:
  Geometry(const Problem& problem, const CpuPlan& plan) : p_(problem), plan_(plan) {}

  bool planes() const { return plan_.scheme == Scheme::kPlanes; }
  int group_rows() const { return plan_.group_rows; }
  // Columns stand for the unit's channels in order, one each.
  bool plain_columns() const { return plan_.scheme == Scheme::kColumns && plan_.fold == 1; }

  Matrix matrix(const Channels& g) const {
    if (plan_.scheme == Scheme::kExpanded) {
      // The bits of all of an image's planes follow each other without padding.
      return {g.begin * p_.s,           p_.n, p_.c * p_.s, g.count() * p_.s, g.begin * p_.s / 8,
              p_.c * mask_row_bytes(p_)};
    }
    // The bits of a folded row follow each other without padding, too.
    const std::int64_t row = plan_.fold * p_.c;
    const bool folded = plan_.fold > 1;
    return {g.begin,     p_.n * p_.s / plan_.fold,
            row,         folded ? row : g.count(),
            g.begin / 8, folded ? row / 8 : mask_row_bytes(p_)};
  }

  // The rows of the tensor that do not fill a folded row: one row of fewer columns, or none.
  Matrix rest(const Channels& g) const {
    if (planes() || plan_.fold == 1) return {0, 0, 0, 0, 0, 0};
    const std::int64_t left = p_.n * p_.s % plan_.fold;
    const std::int64_t whole = (p_.n * p_.s - left) * p_.c;
    return {whole, left > 0 ? 1 : 0, 0, left * g.count(), whole / 8, 0};
  }

  // The columns of one channel (counted from the group's first) among cols.
  struct Columns {
    std::int64_t first, step, count;
  };
  Columns columns_of(std::int64_t channel, const Channels& g, std::int64_t cols) const {
    if (plan_.scheme == Scheme::kExpanded) return {channel * p_.s, 1, p_.s};
    return {channel, g.count(), cols / g.count()};
  }

  // Rows that follow each other without a gap are written together: a kernel's call is then long
  // enough. With a mask, only where its rows have no gap either.
  std::int64_t rows_at_once(const Matrix& m, bool masked) const {
    constexpr std::int64_t kLongRun = 1024;
    const bool no_gap =
        plan_.scheme == Scheme::kColumns && m.stride == m.cols && (!masked || m.cols % 8 == 0);
    return no_gap ? std::max<std::int64_t>(kLongRun / m.cols, 1) : 1;
  }

  // Calls visit(run) for everything in a part of a unit, in the order of memory or backwards: the
  // last rows that a reduction saw are the likeliest to be in a cache. Backwards, rows go in
  // blocks, and forwards within one: prefetchers do not follow rows that begin one before the
  // other.
  template <typename Visit>
  void for_each_run(const Channels& unit, const Part& part, bool masked, bool backwards,
                    const Visit& visit) const {
    if (planes()) return for_each_plane_run(unit, part, backwards, visit);
    const Matrix m = matrix(unit), r = rest(unit);
    const std::int64_t begin = part.begin(m.rows), end = part.end(m.rows);
    const std::int64_t step = rows_at_once(m, masked);
    const std::int64_t block_bytes = step * m.cols * size_of(p_.dtype);
    const std::int64_t block =
        backwards ? step * std::max<std::int64_t>(kBlockBytes / block_bytes, 1) : end - begin;
    for (std::int64_t to = end; to > begin; to -= block) {
      const std::int64_t from = std::max(to - block, begin);
      for (std::int64_t row = from; row < to; row += step) {
        const std::int64_t count = std::min(step, to - row);
        const std::int64_t next = row + step < to ? row + step : std::max(from - block, begin);
        visit(Run{m.offset + row * m.stride, m.mask_offset + row * m.mask_stride, count * m.cols, 0,
                  1, (next - row) * m.stride});
      }
    }
    if (r.rows > 0 && part.is_last()) visit(Run{r.offset, r.mask_offset, r.cols, 0, 1, 0});
  }

 private:
  // What a first-level cache holds twice over, x and y. Channels-last 6272x256 and 25088x512 took
  // 0.38 and 0.65 of the time that rows one before the other take.
  static constexpr std::int64_t kBlockBytes = 64 * 1024;

  // A part may begin and end inside a plane, at a multiple of kCell elements (whole mask bytes).
  template <typename Visit>
  void for_each_plane_run(const Channels& unit, const Part& part, bool backwards,
                          const Visit& visit) const {
    constexpr std::int64_t kCell = 64;
    const std::int64_t cells = (p_.s + kCell - 1) / kCell;
    const std::int64_t all = p_.n * unit.count() * cells;
    const std::int64_t begin = part.begin(all), end = part.end(all);
    if (begin == end) return;
    const std::int64_t first = begin / cells, last = (end - 1) / cells;  // planes of the unit
    std::int64_t count = 0;
    for (std::int64_t done = 0; done <= last - first; done += count) {
      const std::int64_t left = last - first + 1 - done;
      std::int64_t at = backwards ? last - done : first + done;
      const auto is_whole = [&](std::int64_t plane) {
        return plane * cells >= begin && (plane + 1) * cells <= end;
      };
      count = whole_planes(at, left, backwards, unit.count(), is_whole);
      if (backwards) at -= count - 1;
      const std::int64_t from = std::max(begin - at * cells, std::int64_t{0}) * kCell;
      const std::int64_t to = count > 1 ? p_.s : std::min((end - at * cells) * kCell, p_.s);
      const std::int64_t channel = unit.begin + at % unit.count();
      const std::int64_t plane = at / unit.count() * p_.c + channel;
      visit(Run{plane * p_.s + from, plane * mask_row_bytes(p_) + from / 8, to - from, channel,
                count, 0});
    }
  }

  // How many planes from plane `at` on (or back) go together: whole ones of one image. At least 1.
  template <typename IsWhole>
  static std::int64_t whole_planes(std::int64_t at, std::int64_t left, bool backwards,
                                   std::int64_t channels, const IsWhole& is_whole) {
    if (!is_whole(at)) return 1;
    const std::int64_t in_image = backwards ? at % channels + 1 : channels - at % channels;
    const std::int64_t count = std::min(left, in_image);
    const std::int64_t far = backwards ? at - count + 1 : at + count - 1;
    return is_whole(far) ? count : std::max<std::int64_t>(count - 1, 1);  // only ends are partial
  }

  const Problem& p_;
  const CpuPlan& plan_;
};

struct Chunk {
  int count;
  std::int64_t offset[kChunkRows];
  std::int64_t mask[kChunkRows];
};

// Calls visit(chunk) for a matrix's rows [begin, end), at most kChunkRows at a time.
template <typename Visit>
void for_each_chunk(const Matrix& matrix, std::int64_t begin, std::int64_t end,
                    const Visit& visit) {
  Chunk chunk;
  for (std::int64_t row = begin; row < end; row += chunk.count) {
    chunk.count = static_cast<int>(std::min<std::int64_t>(kChunkRows, end - row));
    for (int i = 0; i < chunk.count; ++i) {
      chunk.offset[i] = matrix.offset + (row + i) * matrix.stride;
      chunk.mask[i] = matrix.mask_offset + (row + i) * matrix.mask_stride;
    }
    visit(chunk);
  }
}

// Calls visit(run) for what a reduction takes at once.
template <typename Visit>
void for_each_piece(const Run& run, const Visit& visit) {
  if (run.length <= kRunLength) return visit(run);
  const std::int64_t mask_bytes = (run.length + 7) / 8;
  for (std::int64_t i = 0; i < run.count; ++i) {
    for (std::int64_t at = 0; at < run.length; at += kRunLength) {
      visit(Run{run.offset + i * run.length + at, run.mask + i * mask_bytes + at / 8,
                std::min<std::int64_t>(kRunLength, run.length - at), run.channel + i, 1, 0});
    }
  }
}

// Values that start at a cache line: a vector of an unaligned array lies in two of them. Not
// initialised.
template <typename Value>
class AlignedArray {
 public:
  static constexpr std::size_t kLine = 64;

  AlignedArray() = default;
  explicit AlignedArray(std::int64_t count) { reserve(count); }
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;
  ~AlignedArray() { std::free(data_); }

  // Forgets what was there where more is asked for.
  void reserve(std::int64_t count) {
    if (count <= count_) return;
    std::free(data_);
    count_ = padded(count);
    data_ = static_cast<Value*>(
        std::aligned_alloc(kLine, static_cast<std::size_t>(count_) * sizeof(Value)));
    if (!data_) {
      count_ = 0;
      throw std::bad_alloc();
    }
  }
  Value* data() const { return data_; }

  // Whole cache lines.
  static std::int64_t padded(std::int64_t count) { return (count + 15) / 16 * 16; }

 private:
  Value* data_ = nullptr;
  std::int64_t count_ = 0;
};

// Memory that a thread keeps from call to call, one block per use and type.
enum Slot { kFirstSum, kSecondSum, kCenter, kScale, kShift, kSlope, kOffset, kKept, kSlots };

template <typename Value>
Value* scratch(Slot slot, std::int64_t count) {
  thread_local std::array<AlignedArray<Value>, kSlots> slots;
  slots[slot].reserve(count);
  return slots[slot].data();
}

inline void finish_streaming_stores() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

// How the values of a channel are looked at by a reduction of moments: as differences from K. The
// first sight is good enough but where its sums say otherwise; then all of a unit is seen once
// more.
enum class Sight : std::uint8_t {
  kHead,             // K is the mean of the first values
  kMean,             // ... which was far from the mean: K is that
  kReduced,          // squares overflowed: differences made small
  kReducedFromMean,  // both
  kSettled
};

// The one skeleton: for each unit, an operation's
//   prepare(channels)     per-channel values that the reduction needs
//   reduce(unit, part, sight)  partial results of a part's rows
//   settle(channels, sight)    ... of all parts, or another way to get them
//   finish(channels)      partial results -> per-channel results
//   apply(unit, part)     writes a part's elements.
template <typename Operation>
void run_units(const Problem& problem, const CpuPlan& plan, const ParallelFor& parallel_for,
               Operation& operation) {
  const auto run = [&](std::int64_t tasks, const auto& body) {
    if (plan.threads == 1 || tasks == 1) {
      for (std::int64_t i = 0; i < tasks; ++i) body(i);
    } else {
      parallel_for(tasks, body);
    }
  };
  const std::int64_t units = (problem.c + plan.unit_channels - 1) / plan.unit_channels;
  const auto unit_at = [&](std::int64_t u) {
    return Channels{u * plan.unit_channels, std::min((u + 1) * plan.unit_channels, problem.c)};
  };
  const auto apply = [&](const Channels& unit, const Part& part) {
    operation.apply(unit, part);
    if (plan.stream) finish_streaming_stores();
  };
  if (!plan.cooperative) {
    run(units, [&](std::int64_t u) {
      const Channels unit = unit_at(u);
      operation.prepare(unit);
      for (Sight sight{}; operation.reduces() && sight != Sight::kSettled;
           sight = operation.next_sight(unit)) {
        operation.reduce(unit, Part{0, 1}, sight);
        operation.settle(unit, sight);
      }
      operation.finish(unit);
      apply(unit, Part{0, 1});
    });
    return;
  }
  for (std::int64_t u = 0; u < units; ++u) {
    const Channels unit = unit_at(u);
    const std::int64_t parts = plan.threads;
    // Per-channel work is worth other threads only where there are many channels.
    const std::int64_t slices = unit.count() * parts >= 4096 ? parts : 1;
    const auto slice = [&](std::int64_t i) {
      const Part part{i, slices};
      return Channels{unit.begin + part.begin(unit.count()), unit.begin + part.end(unit.count())};
    };
    run(slices, [&](std::int64_t i) { operation.prepare(slice(i)); });
    for (Sight sight{}; operation.reduces() && sight != Sight::kSettled;
         sight = operation.next_sight(unit)) {
      run(parts, [&](std::int64_t i) { operation.reduce(unit, {i, parts}, sight); });
      run(slices, [&](std::int64_t i) { operation.settle(slice(i), sight); });
    }
    run(slices, [&](std::int64_t i) { operation.finish(slice(i)); });
    run(parts, [&](std::int64_t i) { apply(unit, {i, parts}); });
  }
}

// Partial results, [parts][channels].
template <typename Value>
class Partials {
 public:
  Partials(const CpuPlan& plan, std::int64_t channels)
      : channels_(channels),
        parts_(plan.cooperative ? plan.threads : 1),
        values_(static_cast<std::size_t>(parts_ * channels)) {}

  Value& at(std::int64_t part, std::int64_t channel) {
    return values_[static_cast<std::size_t>(part * channels_ + channel)];
  }
  // Of all parts, in their order.
  Value total(std::int64_t channel) {
    Value total;
    for (std::int64_t part = 0; part < parts_; ++part) total += at(part, channel);
    return total;
  }
  void clear(std::int64_t part, const Channels& channels) {
    std::fill_n(&at(part, channels.begin), channels.count(), Value{});
  }
  std::int64_t parts() const { return parts_; }

 private:
  std::int64_t channels_, parts_;
  std::vector<Value> values_;
};

double load_half_precision(const ChannelValues& values, std::int64_t channel);
void store_half_precision(const ChannelValues& values, std::int64_t channel, double value);

// Inline, since a call of few rows and many channels spends its time here.
inline double load_value(const ChannelValues& values, std::int64_t channel, double otherwise) {
  if (!values.data) return otherwise;
  const std::int64_t at = channel * values.stride;
  if (values.dtype == DType::kFloat) return static_cast<const float*>(values.data)[at];
  if (values.dtype == DType::kDouble) return static_cast<const double*>(values.data)[at];
  return load_half_precision(values, channel);
}

inline void store_value(const ChannelValues& values, std::int64_t channel, double value) {
  if (!values.data) return;
  const std::int64_t at = channel * values.stride;
  if (values.dtype == DType::kFloat) {
    static_cast<float*>(values.data)[at] = static_cast<float>(value);
  } else if (values.dtype == DType::kDouble) {
    static_cast<double*>(values.data)[at] = value;
  } else {
    store_half_precision(values, channel, value);
  }
}

// A unit's entries of a per-channel array, one for each of cols columns: the array itself where
// columns are channels, else copies. Runs of one channel take theirs from it (see at_channel).
template <typename A>
const A* per_column(const A* per_channel, const Geometry& geometry, const Channels& unit,
                    std::int64_t cols, Slot slot) {
  if (geometry.plain_columns() && cols == unit.count()) return per_channel + unit.begin;
  A* const out = scratch<A>(slot, cols);
  for (std::int64_t c = 0; c < unit.count(); ++c) {
    const auto columns = geometry.columns_of(c, unit, cols);
    for (std::int64_t j = 0; j < columns.count; ++j) {
      out[columns.first + j * columns.step] = per_channel[unit.begin + c];
    }
  }
  return out;
}

// A value as kernels take it. Of the many that are nan, the one whose lower bits are zero: what has
// others would not survive the rounding to bfloat16.
template <typename A>
A for_kernels(double value) {
  return value != value ? std::numeric_limits<A>::quiet_NaN() : static_cast<A>(value);
}

// Per-channel parameters of z = (x - center) * scale + shift, and how kernels get at them.
template <typename T>
class AffineTable {
 public:
  using A = Accumulate<T>;
  explicit AffineTable(std::int64_t channels) : values_(3 * values_.padded(channels)) {
    center = values_.data();
    scale = center + values_.padded(channels);
    shift = scale + values_.padded(channels);
  }

  // The mean's rounding error goes into shift.
  void set(std::int64_t c, double mean, double invstd, double weight, double bias) {
    const double slope = weight * invstd;
    center[c] = for_kernels<A>(mean);
    scale[c] = for_kernels<A>(slope);
    shift[c] = for_kernels<A>(bias + (static_cast<double>(center[c]) - mean) * slope);
  }

  // For all channels (runs), or for a unit's columns.
  ForwardParams<A> params(double activation_param) const {
    return {center, scale, shift, for_kernels<A>(activation_param)};
  }
  ForwardParams<A> params(double activation_param, const Geometry& geometry, const Channels& unit,
                          std::int64_t cols) const {
    return {per_column(center, geometry, unit, cols, kCenter),
            per_column(scale, geometry, unit, cols, kScale),
            per_column(shift, geometry, unit, cols, kShift), for_kernels<A>(activation_param)};
  }

  A *center, *scale, *shift;

 private:
  AlignedArray<A> values_;
};

// Parameters of all channels -> of one.
template <typename A>
ForwardParams<A> at_channel(const ForwardParams<A>& p, std::int64_t c) {
  return {p.center + c, p.scale + c, p.shift + c, p.activation_param};
}

}  // namespace cpu
}  // namespace batchnorm
