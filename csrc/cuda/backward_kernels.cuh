// Gradients. With dz = dy * act'(z), over the n elements of a channel:
//   dbias = sum(dz), dweight = invstd * sum(dz * (x - mean)), dresidual = dz,
//   dx = scale * (dz + (x - center) * slope + offset),
// slope and offset being what the two sums make of it in training, and 0 otherwise.
//
// x and dy are read once for the sums and, where they do not stay in shared memory, once more for
// the gradients; residual or mask, if z needs them, are read twice; dx and dresidual are written
// once. Launched like the forward kernels.
#pragma once

#include "core/calls.h"
#include "cuda/activations.cuh"
#include "cuda/channel_values.cuh"
#include "cuda/choices.h"
#include "cuda/team.cuh"

namespace batchnorm {
namespace cuda {

struct BackwardArguments {
  Geometry geometry;
  Backward call;
  bool reduce, apply;  // the passes of this launch
  void* workspace;     // partial results (Exchange)
};

// slope and offset of the thread's lanes. One lane's are kept in registers; of 8 columns there are
// too many, so they stay in shared memory, in the place of the reduction's tree.
template <typename A, typename WalkType>
class InputTerms;

template <typename A, Access kAccess>
class InputTerms<A, PlanesWalk<kAccess>> {
 public:
  __device__ InputTerms(const PlanesWalk<kAccess>&, const Scratch<A>& scratch)
      : slope_(scratch.finals()[3]), offset_(scratch.finals()[4]) {}
  __device__ A at(int, A centered) const { return fma_of(slope_, centered, offset_); }

 private:
  A slope_, offset_;
};

template <typename A, Access kAccess>
class InputTerms<A, ColumnsWalk<kAccess>> {
 public:
  // Called by all threads.
  __device__ InputTerms(const ColumnsWalk<kAccess>& walk, const Scratch<A>& scratch)
      : slopes_(scratch.tree() + walk.cell()),
        offsets_(slopes_ + kCellElements * walk.tree_threads()),
        stride_(walk.tree_threads()) {
    if (walk.group() == 0) {
      for (int e = 0; e < kCellElements; ++e) {
        const A* const finals = scratch.finals() + walk.channel_of(e) * kFinalValues;
        slopes_[e * stride_] = finals[3];
        offsets_[e * stride_] = finals[4];
      }
    }
    __syncthreads();
  }
  __device__ A at(int e, A centered) const {
    return fma_of(slopes_[e * stride_], centered, offsets_[e * stride_]);
  }

 private:
  A *slopes_, *offsets_;  // of the thread's first column; the next one's is stride_ further
  int stride_;
};

template <typename T, Mapping kMapping, Access kAccess, bool kSmooth>
class Gradients {
 public:
  using A = Accumulate<T>;
  using WalkType = Walk<kMapping, kAccess>;
  static constexpr int kLanes = WalkType::kLanes;
  static constexpr int kAtOnce = kCellsAtOnce<T, kAccess, 2>;
  // Two cells of 8 columns with all their parameters need more than 128 registers; most cells of
  // the second pass come from shared memory, which needs no loads on their way.
  static constexpr int kAgainAtOnce = kLanes == 1 ? kAtOnce : 1;

  __device__ Gradients(const BackwardArguments& a, const Unit& unit, void* shared)
      : a_(a),
        unit_(unit),
        slots_(shared, a.geometry.slots),
        scratch_(a.geometry, kMapping,
                 static_cast<char*>(shared) + Slots<T, 2>::bytes(a.geometry.slots)),
        walk_(a.geometry, unit) {}

  __device__ const Scratch<A>& scratch() const { return scratch_; }

  // What was saved of a channel.
  struct Saved {
    double mean, invstd;
  };
  __device__ Saved saved_of(int channel) const {
    const std::int64_t c = unit_.first_channel + channel;
    return {a_.call.mean[c], a_.call.invstd[c]};
  }

  // Per-channel values that both passes need. All are on their way at once, beside the first cells.
  __device__ Saved prepare(int channel) const {
    const std::int64_t c = unit_.first_channel + channel;
    const RawValue weight = load_raw(a_.call.weight, c), bias = load_raw(a_.call.bias, c);
    const Saved saved = saved_of(channel);
    write_affine(scratch_.finals() + channel * kFinalValues, saved.mean, saved.invstd,
                 widen(a_.call.weight, weight, 1), widen(a_.call.bias, bias, 0));
    return saved;
  }

  // No thread gets beyond the channels' values before they are there, but its cells may be fetched.
  __device__ void prefetch_first() const {
    WalkType walk = walk_;
    for (int i = 0; i < min(kAtOnce, walk.count()); ++i, walk.forward()) {
      const std::int64_t offset = walk.place().offset;
      prefetch(static_cast<const T*>(a_.call.x) + offset);
      prefetch(static_cast<const T*>(a_.call.dy) + offset);
    }
  }

  // What was saved of the channel `own` (-1: none) is needed next: it is read again, on its way
  // while the threads meet, since the pass itself has no registers to keep it.
  __device__ Saved reduce(int own, const Exchange<A>& exchange) {
    Affine<A, kLanes> affine;
    load_finals(walk_, scratch_.finals(), affine.values);
    Partial<A, kLanes> partial;
    in_order<kAtOnce>(walk_.count(), [&](auto at_once, int i) {
      constexpr int kCells = decltype(at_once)::value;
      Place places[kCells];
      Cells cells[kCells];
#pragma unroll
      for (int j = 0; j < kCells; ++j, walk_.forward()) {
        places[j] = walk_.place();
        read(places[j], &cells[j]);
      }
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        if (slots_.holds(i + j)) {
          slots_.put(i + j, 0, cells[j].x);
          slots_.put(i + j, 1, cells[j].dy);
        }
        const Values<A> centered = affine.centered(widen(cells[j].x));
        GradientSums::add(&partial, dz_of(affine, cells[j], centered), centered, places[j].valid);
      }
    });
    const Saved saved = own >= 0 ? saved_of(own) : Saved{};
    reduce_block<GradientSums>(walk_, partial, scratch_, exchange.mine(unit_.rank));
    return saved;
  }

  // Sums of a channel -> the parameters' gradients and the second pass' values.
  __device__ void finish(int channel, const Saved& saved, const Partial<A, 1>& total) const {
    const Backward& call = a_.call;
    const std::int64_t c = unit_.first_channel + channel;
    const double n = static_cast<double>(call.problem.per_channel());
    const double dz = total.first[0];
    // sum(dz * (x - mean))
    const double dz_deviation = total.second[0] - lost_of(channel, saved) * dz;
    write_input_terms(channel, saved, dz, saved.invstd * dz_deviation, n);
    if (unit_.rank != 0) return;
    store_value(call.dbias, c, dz);
    store_value(call.dweight, c, saved.invstd * dz_deviation);
  }

  // The sums over all ranks instead of those of a reduction.
  __device__ void use_totals(int channel, const Saved& saved) const {
    const std::int64_t all = a_.call.problem.c, c = unit_.first_channel + channel;
    const double* const totals = a_.call.totals;
    write_input_terms(channel, saved, totals[all + c], totals[c], totals[2 * all]);
  }

  // From the last cell to the first, as in forward.
  __device__ void apply() {
    Affine<A, kLanes> affine;
    load_finals(walk_, scratch_.finals(), affine.values);
    const InputTerms<A, WalkType> input_terms(walk_, scratch_);
    const int count = walk_.count();
    walk_.start_at(count);
    in_order<kAgainAtOnce>(count, [&](auto at_once, int done) {
      constexpr int kCells = decltype(at_once)::value;
      Place places[kCells];
      Cells cells[kCells];
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        walk_.backward();
        places[j] = walk_.place();
        read_again(count - 1 - done - j, places[j], &cells[j]);
      }
#pragma unroll
      for (int j = 0; j < kCells; ++j) write(affine, input_terms, cells[j], places[j]);
    });
  }

 private:
  // What center's rounding took from the mean.
  __device__ double lost_of(int channel, const Saved& saved) const {
    const double center = scratch_.finals()[channel * kFinalValues];
    return saved.mean - center;
  }
  __device__ void write_input_terms(int channel, const Saved& saved, double dbias, double dweight,
                                    double n) const {
    A* const finals = scratch_.finals() + channel * kFinalValues;
    const double slope = -saved.invstd * dweight / n;
    finals[3] = static_cast<A>(slope);
    finals[4] = static_cast<A>(-dbias / n - lost_of(channel, saved) * slope);
  }

  struct Cells {
    Cell<T> x, dy, residual;
    unsigned kept;  // bits of the mask
  };

  __device__ Cell<T> load_at(const void* tensor, const Place& place) const {
    return load<kAccess>(static_cast<const T*>(tensor) + place.offset, place.valid);
  }
  // What z is made of, if it is needed, besides x.
  __device__ void read_rest(const Place& place, Cells* cells) const {
    if (!kSmooth && a_.call.mask) {
      cells->kept = a_.call.mask[place.mask];
    } else if (a_.call.residual) {
      cells->residual = load_at(a_.call.residual, place);
    }
  }
  __device__ void read(const Place& place, Cells* cells) const {
    cells->x = load_at(a_.call.x, place);
    cells->dy = load_at(a_.call.dy, place);
    read_rest(place, cells);
  }
  __device__ void read_again(int cell, const Place& place, Cells* cells) const {
    if (!slots_.holds(cell)) return read(place, cells);
    cells->x = slots_.get(cell, 0);
    cells->dy = slots_.get(cell, 1);
    read_rest(place, cells);
  }

  __device__ Values<A> dz_of(const Affine<A, kLanes>& affine, const Cells& cells,
                             const Values<A>& centered) const {
    const Backward& call = a_.call;
    const A param = static_cast<A>(call.activation_param);
    const Values<A> dy = widen(cells.dy);
    if (!kSmooth && call.mask) return masked_gradient(call.activation, dy, cells.kept, param);
    return activation_gradient<T, kSmooth>(
        call.activation, dy, affine.z(centered, call.residual != nullptr, cells.residual), param);
  }

  __device__ void write(const Affine<A, kLanes>& affine, const InputTerms<A, WalkType>& input_terms,
                        const Cells& cells, const Place& place) const {
    const Backward& call = a_.call;
    const Values<A> centered = affine.centered(widen(cells.x));
    const Values<A> dz = dz_of(affine, cells, centered);
    const bool streaming = a_.geometry.stream_stores;
    if (call.dresidual) {
      store<kAccess>(static_cast<T*>(call.dresidual) + place.offset, narrow<T>(dz), place.valid,
                     streaming);
    }
    if (!call.dx) return;
    Values<A> dx;
#pragma unroll
    for (int e = 0; e < kCellElements; ++e) {
      A inner = dz.value[e];
      if (call.training) inner += input_terms.at(e, centered.value[e]);
      dx.value[e] = affine.scale(e) * inner;
    }
    store<kAccess>(static_cast<T*>(call.dx) + place.offset, narrow<T>(dx), place.valid, streaming);
  }

  const BackwardArguments& a_;
  const Unit unit_;
  const Slots<T, 2> slots_;
  const Scratch<A> scratch_;
  WalkType walk_;
};

template <typename T, Mapping kMapping, Access kAccess, bool kSmooth>
__global__ void __launch_bounds__(kCudaThreads, kBlocksAtOnce<T>)
    backward_kernel(const __grid_constant__ BackwardArguments a) {
  using A = Accumulate<T>;
  using Block = Gradients<T, kMapping, kAccess, kSmooth>;
  const Geometry& g = a.geometry;
  for (int wave = 0; wave * g.units_at_once < g.units; ++wave) {
    const std::int64_t index = wave * g.units_at_once + blockIdx.x / g.team;
    const Unit unit = unit_at(g, index, static_cast<int>(blockIdx.x % g.team));
    Block gradients(a, unit, dynamic_shared<char>());
    const Exchange<A> exchange(g, gradients.scratch(), static_cast<A*>(a.workspace), wave);
    const int own = exchange.own_channel(unit);
    typename Block::Saved saved = {};
    if (unit.exists() && a.reduce) gradients.prefetch_first();
    if (own >= 0) saved = gradients.prepare(own);
    __syncthreads();
    if (unit.exists() && a.reduce) saved = gradients.reduce(own, exchange);
    if (a.reduce) exchange.template meet<GradientSums>(unit);
    Partial<A, 1> total;
    const bool has_sums = a.apply && a.call.reduces();
    if (has_sums) total = exchange.template gather<GradientSums>(unit);
    if (own >= 0 && has_sums) gradients.finish(own, saved, total);
    if (own >= 0 && a.call.totals) gradients.use_totals(own, saved);
    have_gathered(g.strategy);
    if (unit.exists() && a.apply && (a.call.dx || a.call.dresidual)) gradients.apply();
    leave(g.strategy);
  }
}

using BackwardKernel = void (*)(BackwardArguments);

// As forward_kernel_for.
template <typename T>
BackwardKernel backward_kernel_for(Mapping mapping, Access access, bool smooth) {
  return choose_kernel<BackwardKernel>(mapping, access, smooth, [](auto choice) -> BackwardKernel {
    using Choice = decltype(choice);
    return backward_kernel<T, Choice::kMapping, Choice::kAccess, Choice::kSmooth>;
  });
}

}  // namespace cuda
}  // namespace batchnorm
