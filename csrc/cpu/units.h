// Walks a problem in the units of its plan: which rows and runs of elements the kernels see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
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

// Rows of `cols` contiguous elements: row r starts at
// offset + r / inner * outer_stride + r % inner * inner_stride.
struct Strip {
  std::int64_t offset, outer, inner, outer_stride, inner_stride, cols;
  std::int64_t rows() const { return outer * inner; }
};

// Where the elements' mask bits are: byte of the first bit of the row, as for Strip.
struct MaskStrip {
  std::int64_t offset, outer_stride, inner_stride;
};

struct Chunk {
  int count;
  std::int64_t offset[kChunkRows];
  std::int64_t mask[kChunkRows];
};

// Calls visit(chunk) for rows [begin, end), at most kChunkRows at a time.
template <typename Visit>
void for_each_chunk(const Strip& strip, const MaskStrip& mask, std::int64_t begin,
                    std::int64_t end, const Visit& visit) {
  Chunk chunk;
  std::int64_t outer = begin / strip.inner, inner = begin % strip.inner;
  while (begin < end) {
    chunk.count = static_cast<int>(std::min<std::int64_t>(kChunkRows, end - begin));
    for (int i = 0; i < chunk.count; ++i) {
      chunk.offset[i] = strip.offset + outer * strip.outer_stride + inner * strip.inner_stride;
      chunk.mask[i] = mask.offset + outer * mask.outer_stride + inner * mask.inner_stride;
      if (++inner == strip.inner) {
        inner = 0;
        ++outer;
      }
    }
    visit(chunk);
    begin += chunk.count;
  }
}

// A contiguous run to write, and the byte of its first mask bit.
struct Run {
  std::int64_t offset, mask, length;
};

// What the kernels see of the channels of a unit.
class Geometry {
 public:
  Geometry(const Problem& problem, const CpuPlan& plan) : p_(problem), plan_(plan) {}

  bool planes() const { return plan_.scheme == Scheme::kPlanes; }
  // Columns stand for the unit's channels in order, one each.
  bool plain_columns() const { return plan_.scheme == Scheme::kColumns && plan_.fold == 1; }

  // Channels that are reduced together: all of a unit, or one plane's.
  Channels group_at(std::int64_t channel, const Channels& unit) const {
    return planes() ? Channels{channel, channel + 1} : Channels{channel, unit.end};
  }

  // Most of a group's rows ...
  Strip body(const Channels& g) const {
    switch (plan_.scheme) {
      case Scheme::kColumns: {
        const std::int64_t rows = p_.n * p_.s / plan_.fold, row = plan_.fold * p_.c;
        return {g.begin, 1, rows, 0, row, plan_.fold == 1 ? g.count() : row};
      }
      case Scheme::kExpanded:
        return {g.begin * p_.s, 1, p_.n, 0, p_.c * p_.s, g.count() * p_.s};
      default:
        return {g.begin * p_.s, p_.n,        p_.s / plan_.width,
                p_.c * p_.s,    plan_.width, plan_.width};
    }
  }

  // ... and what doesn't fill one: columns 0 to cols of further rows. May be empty.
  Strip tail(const Channels& g) const {
    if (planes()) {
      const std::int64_t whole = p_.s / plan_.width * plan_.width;
      return {g.begin * p_.s + whole, p_.n, 1, p_.c * p_.s, 0, p_.s - whole};
    }
    const std::int64_t whole = p_.n * p_.s / plan_.fold * plan_.fold;
    const bool folded = plan_.scheme == Scheme::kColumns && plan_.fold > 1;
    return {whole * p_.c, 1, 1, 0, 0, folded ? (p_.n * p_.s - whole) * p_.c : 0};
  }

  // The tail's rows that go with a part: those of the planes whose body it finishes.
  std::pair<std::int64_t, std::int64_t> tail_rows(const Strip& body, const Strip& tail,
                                                  const Part& part) const {
    if (tail.cols == 0) return {0, 0};
    if (!planes()) return {0, part.is_last() ? 1 : 0};
    return {part.begin(body.rows()) / body.inner, part.end(body.rows()) / body.inner};
  }

  MaskStrip body_mask(const Channels& g) const {
    const std::int64_t row = mask_row_bytes(p_);
    if (planes()) return {g.begin * row, p_.c * row, plan_.width / 8};
    return {g.begin / 8, 0, row};
  }
  MaskStrip tail_mask(const Channels& g) const {
    const std::int64_t row = mask_row_bytes(p_);
    if (planes()) return {g.begin * row + p_.s / plan_.width * plan_.width / 8, p_.c * row, 0};
    return {0, 0, 0};
  }

  // The columns of one channel among cols: first, step, how many.
  struct Columns {
    std::int64_t first, step, count;
  };
  Columns columns_of(std::int64_t channel, const Channels& g, std::int64_t cols) const {
    switch (plan_.scheme) {
      case Scheme::kColumns:
        return {channel, g.count(), cols / g.count()};
      case Scheme::kExpanded:
        return {channel * p_.s, 1, p_.s};
      default:
        return {0, 1, cols};
    }
  }

  // Calls visit(run) for everything in a part of a group, the last rows first: those the reduction
  // saw last are the likeliest to be in a cache.
  template <typename Visit>
  void for_each_run(const Channels& g, const Part& part, const Visit& visit) const {
    const Strip b = body(g), t = tail(g);
    const MaskStrip m = body_mask(g);
    const std::int64_t begin = part.begin(b.rows());
    std::int64_t end = part.end(b.rows());
    if (planes()) {
      while (end > begin) {  // pieces of planes, with the tail where a piece ends its plane
        const std::int64_t outer = (end - 1) / b.inner;
        const std::int64_t first = std::max(begin, outer * b.inner) - outer * b.inner;
        const std::int64_t last = end - outer * b.inner;
        const std::int64_t length = (last - first) * b.cols + (last == b.inner ? t.cols : 0);
        visit(Run{b.offset + outer * b.outer_stride + first * b.inner_stride,
                  m.offset + outer * m.outer_stride + first * m.inner_stride, length});
        end = outer * b.inner + first;
      }
      return;
    }
    if (t.cols > 0 && part.is_last()) visit(Run{t.offset, 0, t.cols});
    for (std::int64_t r = end; r-- > begin;) {
      visit(Run{b.offset + r * b.inner_stride, m.offset + r * m.inner_stride, b.cols});
    }
  }

 private:
  const Problem& p_;
  const CpuPlan& plan_;
};

// Memory that a thread keeps from call to call, one block per use and type.
enum Slot { kFirstSum, kSecondSum, kCenter, kScale, kShift, kSlope, kOffset, kSlots };

template <typename Value>
Value* scratch(int slot, std::int64_t count) {
  thread_local std::vector<std::vector<Value>> slots(kSlots);
  auto& values = slots[static_cast<std::size_t>(slot)];
  if (values.size() < static_cast<std::size_t>(count)) {
    values.resize(static_cast<std::size_t>(count));
  }
  return values.data();
}

inline void finish_streaming_stores() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

// The one skeleton: for each unit, an operation's
//   prepare(channels)     per-channel values that the reduction needs
//   reduce(unit, part)    partial results of a part's rows
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
      operation.reduce(unit, Part{0, 1});
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
    if (operation.reduces()) run(parts, [&](std::int64_t i) { operation.reduce(unit, {i, parts}); });
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
  std::int64_t parts() const { return parts_; }

 private:
  std::int64_t channels_, parts_;
  std::vector<Value> values_;
};

// Calls body(T{}) with the storage type that dtype names.
template <typename Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat:
      return body(float{});
    case DType::kDouble:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    default:
      return body(Half{});
  }
}

double load_value(const ChannelValues& values, std::int64_t channel, double otherwise);
void store_value(const ChannelValues& values, std::int64_t channel, double value);

// Per-channel parameters of z = (x - center) * scale + shift, and how kernels get at them.
template <typename T>
class AffineTable {
 public:
  using A = Accumulate<T>;
  explicit AffineTable(std::int64_t channels) : values_(static_cast<std::size_t>(3 * channels)) {
    center = values_.data();
    scale = center + channels;
    shift = scale + channels;
  }

  // The mean's rounding error goes into shift.
  void set(std::int64_t c, double mean, double invstd, double weight, double bias) {
    const double slope = weight * invstd;
    center[c] = static_cast<A>(mean);
    scale[c] = static_cast<A>(slope);
    shift[c] = static_cast<A>(bias + (static_cast<double>(center[c]) - mean) * slope);
  }

  A *center, *scale, *shift;

 private:
  std::vector<A> values_;
};

// A group's entries of a per-channel array as a kernel wants them: the array itself where columns
// are channels, one value where all columns share it, else a copy per column.
template <typename A>
const A* spread(const A* per_channel, const Geometry& geometry, const Channels& g,
                std::int64_t cols, Slot slot) {
  if (geometry.plain_columns() || geometry.planes()) return per_channel + g.begin;
  A* const out = scratch<A>(slot, cols);
  for (std::int64_t c = 0; c < g.count(); ++c) {
    const auto columns = geometry.columns_of(c, g, cols);
    for (std::int64_t j = 0; j < columns.count; ++j) {
      out[columns.first + j * columns.step] = per_channel[g.begin + c];
    }
  }
  return out;
}

}  // namespace cpu
}  // namespace batchnorm
