// How a part of a unit is summed up: the kernels' float32 sums become a channel's in double.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/units.h"

namespace batchnorm {
namespace cpu {

// Of the runs of a part (Scheme::kPlanes). add(piece, kept) has a kernel add a piece of a run to
// what is kept of its channel, and of those behind it.
template <typename T, typename Add>
void sum_runs(const Geometry& geometry, const Channels& unit, const Part& part, bool masked,
              Partials<Sums>* partials, const Add& add) {
  using A = Accumulate<T>;
  constexpr std::int64_t kEach = kKeptBytes / sizeof(A);
  A* const kept = scratch<A>(kKept, unit.count() * kEach);
  std::fill_n(kept, unit.count() * kEach, A(0));
  const Channels none{unit.end, unit.begin};
  Channels touched = none;
  int pieces = 0;
  const auto flush = [&] {
    if (touched.begin >= touched.end) return;
    kernels<T>().add_kept(kept + (touched.begin - unit.begin) * kEach, touched.count(),
                          &partials->at(part.index, touched.begin));
    touched = none;
    pieces = 0;
  };
  geometry.for_each_run(unit, part, masked, /*backwards=*/false, [&](const Run& run) {
    for_each_piece(run, [&](const Run& piece) {
      if (pieces == kRunsKept) flush();
      add(piece, kept + (piece.channel - unit.begin) * kEach);
      touched.begin = std::min(touched.begin, piece.channel);
      touched.end = std::max(touched.end, piece.channel + piece.count);
      ++pieces;
    });
  });
  flush();
}

// Of rows [begin, end) of a matrix. add(chunk, kept, first, second) has a kernel add a chunk's rows
// to the sums of the columns.
template <typename T, typename Add>
void sum_rows(const Geometry& geometry, const Channels& unit, const Matrix& matrix,
              std::int64_t begin, std::int64_t end, Sums* totals, const Add& add) {
  if (begin >= end) return;
  double* const first = scratch<double>(kFirstSum, matrix.cols);
  double* const second = scratch<double>(kSecondSum, matrix.cols);
  std::fill_n(first, matrix.cols, 0.0);
  std::fill_n(second, matrix.cols, 0.0);
  auto* const kept = scratch<Accumulate<T>>(kKept, column_scratch(matrix.cols));
  for_each_chunk(matrix, begin, end, [&](const Chunk& chunk) { add(chunk, kept, first, second); });
  for (std::int64_t c = 0; c < unit.count(); ++c) {
    const auto columns = geometry.columns_of(c, unit, matrix.cols);
    for (std::int64_t j = 0; j < columns.count; ++j) {
      const std::int64_t column = columns.first + j * columns.step;
      totals[c] += {first[column], second[column]};
    }
  }
}

// Of all that a part of a unit has in rows: whole ones, and what does not fill one.
template <typename T, typename Add>
void sum_all_rows(const Geometry& geometry, const Channels& unit, const Part& part,
                  Partials<Sums>* partials, const Add& add) {
  Sums* const totals = &partials->at(part.index, unit.begin);
  const Matrix matrix = geometry.matrix(unit), rest = geometry.rest(unit);
  const auto sum = [&](const Matrix& m, std::int64_t begin, std::int64_t end) {
    sum_rows<T>(geometry, unit, m, begin, end, totals,
                [&](const Chunk& chunk, auto* kept, double* first, double* second) {
                  add(chunk, m.cols, kept, first, second);
                });
  };
  sum(matrix, part.begin(matrix.rows), part.end(matrix.rows));
  if (part.is_last()) sum(rest, 0, rest.rows);
}

}  // namespace cpu
}  // namespace batchnorm
