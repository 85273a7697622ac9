// Where the cells of a thread lie.
#pragma once

#include "cuda/cell.cuh"

namespace batchnorm {
namespace cuda {

// The problem and its plan as the kernels need them.
struct Geometry {
  Problem problem;
  Strategy strategy;
  int team, slots;
  bool stream_stores;
  bool is_shared_out;         // among the blocks of a team (shares_out), their partial results
  bool is_gathered_by_warps;  // where totals are not there yet; a thread alone would wait for them
  std::int64_t unit_channels, units, units_at_once;
  // kColumns: a unit's matrix. Its row r begins at element r * row_stride + first channel *
  // columns_per_channel, its mask at byte r * mask_stride + (the same channel's) / 8.
  std::int64_t rows, row_stride, columns_per_channel, mask_stride;
};

constexpr int kGatheredByOne = 8;  // partial results

inline Geometry geometry_of(const Problem& p, const CudaPlan& plan) {
  const bool first = p.layout == Layout::kChannelsFirst;
  const std::int64_t columns = columns_per_channel(p);
  const bool shared_out = shares_out(plan.strategy, plan.team, plan.unit_channels);
  return {p,
          plan.strategy,
          plan.team,
          plan.slots,
          plan.stream_stores,
          shared_out,
          !shared_out && plan.team > kGatheredByOne,
          plan.unit_channels,
          plan.units,
          plan.units_at_once,
          matrix_rows(p),
          p.c * columns,
          columns,
          first ? p.c * columns / kCellElements : mask_row_bytes(p)};
}

// A unit's channels, and a block's place in the team that works on it. Of the last wave's blocks
// some have none: they only meet the others.
struct Unit {
  std::int64_t first_channel;
  int channels, rank;

  __device__ bool exists() const { return channels > 0; }
};

__device__ inline Unit unit_at(const Geometry& g, std::int64_t index, int rank) {
  if (index >= g.units) return {0, 0, rank};
  const std::int64_t first = index * g.unit_channels;
  const std::int64_t left = g.problem.c - first;
  return {first, static_cast<int>(left < g.unit_channels ? left : g.unit_channels), rank};
}

struct Place {
  std::int64_t offset;  // of the cell's first element in the tensor
  std::int64_t mask;    // of its byte in the mask
  int valid;            // how many of its elements exist
};

// How many of first, first + step, first + 2 step ... are less than end. What one thread does fits
// an int; positions need 64 bits.
__device__ inline int steps(std::int64_t first, std::int64_t step, std::int64_t end) {
  return first < end ? static_cast<int>((end - 1 - first) / step) + 1 : 0;
}

constexpr std::int64_t kWhole = kCellElements;
static_assert(kCellElements == 8, "a cell has a byte of the mask");

// Where vectors are possible rows have no padding in the mask either.
__device__ inline Place whole_cell(std::int64_t offset) {
  return {offset, offset >> 3, kCellElements};
}

// The thread's cells of one channel, plane by plane; neighbouring threads have neighbouring cells.
template <Access kAccess>
class PlanesWalk {
 public:
  static constexpr int kLanes = 1;  // all elements of a cell belong to one channel

  __device__ PlanesWalk(const Geometry& g, const Unit& unit)
      : g_(g),
        channel_(unit.first_channel),
        cells_((g.problem.s + kCellElements - 1) / kCellElements) {
    step_ = static_cast<std::int64_t>(g.team) * kCudaThreads;
    first_ = static_cast<std::int64_t>(unit.rank) * kCudaThreads + threadIdx.x;
    step_image_ = step_ / cells_;
    step_cell_ = step_ % cells_;
    count_ = steps(first_, step_, g.problem.n * cells_);
    start_at(0);
  }

  __device__ int count() const { return count_; }
  __device__ void start_at(int i) {
    const std::int64_t at = first_ + static_cast<std::int64_t>(i) * step_;
    image_ = at / cells_;
    cell_ = at % cells_;
  }
  __device__ void forward() {
    image_ += step_image_;
    cell_ += step_cell_;
    if (cell_ >= cells_) cell_ -= cells_, ++image_;
  }
  __device__ void backward() {
    image_ -= step_image_;
    cell_ -= step_cell_;
    if (cell_ < 0) cell_ += cells_, --image_;
  }
  __device__ Place place() const {
    const std::int64_t plane = image_ * g_.problem.c + channel_;
    const std::int64_t offset = plane * g_.problem.s + cell_ * kCellElements;
    if constexpr (kAccess == Access::kVector) return whole_cell(offset);
    const std::int64_t left = g_.problem.s - cell_ * kCellElements;
    return {offset, plane * cells_ + cell_, static_cast<int>(min(left, kWhole))};
  }
  __device__ int channel_of(int) const { return 0; }

 private:
  const Geometry& g_;
  std::int64_t channel_, cells_, step_, first_, step_image_, step_cell_, image_, cell_;
  int count_;
};

// The thread's cells of a matrix: the same 8 columns of every groups-th row.
template <Access kAccess>
class ColumnsWalk {
 public:
  static constexpr int kLanes = kCellElements;  // each column has sums of its own

  __device__ ColumnsWalk(const Geometry& g, const Unit& unit)
      : g_(g),
        width_(static_cast<int>(max(unit.channels, 1) * g.columns_per_channel)),
        cells_((width_ + kCellElements - 1) / kCellElements),
        groups_(kCudaThreads / cells_),
        group_(static_cast<int>(threadIdx.x) / cells_),
        column_(static_cast<int>(threadIdx.x) % cells_ * kCellElements) {
    first_element_ = unit.first_channel * g.columns_per_channel + column_;
    step_ = static_cast<std::int64_t>(g.team) * groups_;
    first_row_ = static_cast<std::int64_t>(unit.rank) * groups_ + group_;
    count_ = group_ < groups_ ? steps(first_row_, step_, g.rows) : 0;
    start_at(0);
  }

  __device__ int count() const { return count_; }
  __device__ void start_at(int i) { row_ = first_row_ + static_cast<std::int64_t>(i) * step_; }
  __device__ void forward() { row_ += step_; }
  __device__ void backward() { row_ -= step_; }
  __device__ Place place() const {
    const std::int64_t offset = first_element_ + row_ * g_.row_stride;
    if constexpr (kAccess == Access::kVector) return whole_cell(offset);
    return {offset, first_element_ / kCellElements + row_ * g_.mask_stride,
            min(width_ - column_, kCellElements)};
  }
  // Of a lane, counted from the unit's first. The lanes beyond the last column get the last one's.
  __device__ int channel_of(int lane) const {
    const int column = column_ + lane;
    return (column < width_ ? column : width_ - 1) / static_cast<int>(g_.columns_per_channel);
  }

  __device__ int channels() const { return width_ / static_cast<int>(g_.columns_per_channel); }
  __device__ int width() const { return width_; }
  __device__ int cells() const { return cells_; }
  __device__ int groups() const { return groups_; }
  __device__ int group() const { return group_; }
  __device__ int cell() const { return column_ / kCellElements; }
  // What the tree of a reduction is laid out for (CudaScratch): threads that write at a time.
  __device__ int tree_threads() const { return max(cells_, kCudaThreads / 2); }

 private:
  const Geometry& g_;
  int width_, cells_, groups_, group_, column_, count_;
  std::int64_t first_element_, step_, first_row_, row_;
};

template <Mapping kMapping, Access kAccess>
struct WalkOf {
  using type = PlanesWalk<kAccess>;
};
template <Access kAccess>
struct WalkOf<Mapping::kColumns, kAccess> {
  using type = ColumnsWalk<kAccess>;
};
template <Mapping kMapping, Access kAccess>
using Walk = typename WalkOf<kMapping, kAccess>::type;

// How many cells a visit is about, known when it is compiled.
template <int kCells>
struct AtOnce {
  static constexpr int value = kCells;
};

// Calls visit(AtOnce<k>, first) for the cells 0 ... count - 1 in order, k = kAtOnce of them at a
// time while there are so many, then one by one. Loads of several cells are then on their way at
// once.
template <int kAtOnce, typename Visit>
__device__ void in_order(int count, const Visit& visit) {
  int i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) visit(AtOnce<kAtOnce>{}, i);
  if constexpr (kAtOnce > 1) {
    for (; i < count; ++i) visit(AtOnce<1>{}, i);
  }
}

}  // namespace cuda
}  // namespace batchnorm
