// Training and inference: statistics of the batch, and y = act((x - mean) * invstd * weight + bias
// + residual).
//
// x is read once for the statistics and, where it does not stay in shared memory, once more for y;
// residual is read and y written once. Of a call: Geometry says which block has which unit, and
// which thread which cells. Launched with kCudaThreads threads, team * units_at_once blocks and the
// plan's shared memory; cooperatively for Strategy::kGrid, in clusters of `team` for kCluster.
#pragma once

#include "core/calls.h"
#include "cuda/activations.cuh"
#include "cuda/channel_values.cuh"
#include "cuda/choices.h"
#include "cuda/team.cuh"

namespace batchnorm {
namespace cuda {

struct ForwardArguments {
  Geometry geometry;
  ForwardTrain call;   // its statistics' pointers are null for inference
  bool training;       // else statistics are the running ones
  bool reduce, apply;  // the passes of this launch
  void* workspace;     // partial results (Exchange)
};

template <typename T, Mapping kMapping, Access kAccess, bool kSmooth>
class Forward {
 public:
  using A = Accumulate<T>;
  using WalkType = Walk<kMapping, kAccess>;
  static constexpr int kLanes = WalkType::kLanes;
  static constexpr int kAtOnce = kCellsAtOnce<T, kAccess, 1>;

  __device__ Forward(const ForwardArguments& a, const Unit& unit, void* shared)
      : a_(a),
        unit_(unit),
        x_(static_cast<const T*>(a.call.x)),
        slots_(shared, a.geometry.slots),
        scratch_(a.geometry, kMapping,
                 static_cast<char*>(shared) + Slots<T, 1>::bytes(a.geometry.slots)),
        walk_(a.geometry, unit) {}

  __device__ const Scratch<A>& scratch() const { return scratch_; }

  // Begins to fetch what will be needed of a channel once x was read.
  __device__ void prefetch_parameters(int channel) const {
    const std::int64_t c = unit_.first_channel + channel;
    prefetch(a_.call.weight, c);
    prefetch(a_.call.bias, c);
    if (unit_.rank != 0) return;
    prefetch(a_.call.running.mean, c);
    prefetch(a_.call.running.var, c);
  }

  // What a channel is finished with. All are on their way at once, and widened when they are
  // needed.
  struct Parameters {
    RawValue weight, bias;
    T first;
  };
  __device__ Parameters parameters_of(int channel) const {
    const std::int64_t c = unit_.first_channel + channel;
    return {load_raw(a_.call.weight, c), load_raw(a_.call.bias, c),
            x_[c * a_.geometry.columns_per_channel]};
  }

  // First pass: moments of x - (the channel's first element), so that no digits are lost to a
  // large mean. The parameters of the channel `own` (-1: none) are needed next: they are on their
  // way while the threads meet, since the pass itself has no registers for them.
  __device__ Parameters reduce(int own, const Exchange<A>& exchange) {
    A shift[kLanes];
#pragma unroll
    for (int l = 0; l < kLanes; ++l) shift[l] = first_element(walk_.channel_of(l));
    Partial<A, kLanes> partial;
    in_order<kAtOnce>(walk_.count(), [&](auto at_once, int i) {
      constexpr int kCells = decltype(at_once)::value;
      Cell<T> cells[kCells];
      int valid = kCellElements;
#pragma unroll
      for (int j = 0; j < kCells; ++j, walk_.forward()) {
        const Place place = walk_.place();
        cells[j] = load<kAccess>(x_ + place.offset, place.valid);
        valid = place.valid;
      }
      Values<A> x[kCells];
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        if (slots_.holds(i + j)) slots_.put(i + j, 0, cells[j]);
        x[j] = widen(cells[j]);
#pragma unroll
        for (int e = 0; e < kCellElements; ++e) x[j].value[e] -= shift[kLanes == 1 ? 0 : e];
      }
      Moments::add(&partial, x, valid);
    });
    const Parameters parameters = own >= 0 ? parameters_of(own) : Parameters{};
    reduce_block<Moments>(walk_, partial, scratch_, exchange.mine(unit_.rank));
    return parameters;
  }

  struct Statistics {
    double mean, m2, invstd;
  };

  // Moments of a channel -> its statistics and the second pass' values.
  __device__ Statistics finish(int channel, const Parameters& parameters,
                               const Partial<A, 1>& total) const {
    const double n = static_cast<double>(a_.call.problem.per_channel());
    const double mean = static_cast<double>(widen(parameters.first)) + total.first[0];
    const double m2 = total.second[0];
    const double invstd = 1 / sqrt(m2 / n + a_.call.eps);
    write_finals(channel, parameters, mean, invstd);
    return {mean, m2, invstd};
  }

  // Nobody waits for what is saved, nor for the running statistics.
  __device__ void record(int channel, const Statistics& batch, double momentum) const {
    const ForwardTrain& call = a_.call;
    const std::int64_t c = unit_.first_channel + channel;
    call.mean[c] = batch.mean;
    if (call.invstd) call.invstd[c] = batch.invstd;
    if (call.m2) call.m2[c] = batch.m2;
    const double n = static_cast<double>(call.problem.per_channel());
    move(call.running, c, {batch.mean, batch.m2, n}, momentum);
  }

  // Inference: the running statistics -> the second pass' values.
  __device__ void use_running_statistics(int channel, const Parameters& parameters) const {
    const RunningStatistics& running = a_.call.running;
    const std::int64_t c = unit_.first_channel + channel;
    const RawValue mean = load_raw(running.mean, c), var = load_raw(running.var, c);
    const double variance = widen(running.var, var, 1);
    write_finals(channel, parameters, widen(running.mean, mean, 0),
                 1 / sqrt(variance + a_.call.eps));
  }

  // Second pass, from the last cell to the first: what does not stay in shared memory was read last
  // and is the likeliest to be in a cache.
  __device__ void apply() {
    Affine<A, kLanes> affine;
    load_finals(walk_, scratch_.finals(), affine.values);
    const int count = walk_.count();
    walk_.start_at(count);
    in_order<kAtOnce>(count, [&](auto at_once, int done) {
      constexpr int kCells = decltype(at_once)::value;
      Place places[kCells];
      Cell<T> x[kCells], residual[kCells];
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        walk_.backward();
        places[j] = walk_.place();
        const int cell = count - 1 - done - j;
        x[j] = slots_.holds(cell) ? slots_.get(cell, 0)
                                  : load<kAccess>(x_ + places[j].offset, places[j].valid);
        if (a_.call.residual)
          residual[j] = load<kAccess>(at(a_.call.residual, places[j]), places[j].valid);
      }
#pragma unroll
      for (int j = 0; j < kCells; ++j) write(affine, places[j], x[j], residual[j]);
    });
  }

 private:
  __device__ static const T* at(const void* tensor, const Place& place) {
    return static_cast<const T*>(tensor) + place.offset;
  }
  __device__ A first_element(int channel) const {
    return widen(x_[(unit_.first_channel + channel) * a_.geometry.columns_per_channel]);
  }
  __device__ void write_finals(int channel, const Parameters& parameters, double mean,
                               double invstd) const {
    write_affine(scratch_.finals() + channel * kFinalValues, mean, invstd,
                 widen(a_.call.weight, parameters.weight, 1),
                 widen(a_.call.bias, parameters.bias, 0));
  }

  __device__ void write(const Affine<A, kLanes>& affine, const Place& place, const Cell<T>& x,
                        const Cell<T>& residual) const {
    const ForwardTrain& call = a_.call;
    const Values<A> z = affine.z(affine.centered(widen(x)), call.residual != nullptr, residual);
    if (!kSmooth && call.mask) {
      const unsigned existing = (1u << place.valid) - 1;
      call.mask[place.mask] =
          static_cast<std::uint8_t>(kept_elements<T>(call.activation, z) & existing);
    }
    const Values<A> y =
        activate<T, kSmooth>(call.activation, z, static_cast<A>(call.activation_param));
    store<kAccess>(static_cast<T*>(call.y) + place.offset, narrow<T>(y), place.valid,
                   a_.geometry.stream_stores);
  }

  const ForwardArguments& a_;
  const Unit unit_;
  const T* x_;
  const Slots<T, 1> slots_;
  const Scratch<A> scratch_;
  WalkType walk_;
};

// Read by all before one writes the counter: see the plan.
__device__ inline double momentum_of(const ForwardArguments& a) {
  return a.apply ? momentum_of(a.call.running, a.reduce) : 0;
}

template <typename T, Mapping kMapping, Access kAccess, bool kSmooth>
__global__ void __launch_bounds__(kCudaThreads, kBlocksAtOnce<T>)
    forward_kernel(const __grid_constant__ ForwardArguments a) {
  using A = Accumulate<T>;
  using Block = Forward<T, kMapping, kAccess, kSmooth>;
  const Geometry& g = a.geometry;
  const double momentum = momentum_of(a);
  for (int wave = 0; wave * g.units_at_once < g.units; ++wave) {
    const std::int64_t index = wave * g.units_at_once + blockIdx.x / g.team;
    const Unit unit = unit_at(g, index, static_cast<int>(blockIdx.x % g.team));
    Block forward(a, unit, dynamic_shared<char>());
    const Exchange<A> exchange(g, forward.scratch(), static_cast<A*>(a.workspace), wave);
    const int own = a.apply ? exchange.own_channel(unit) : -1;
    typename Block::Parameters parameters = {};
    if (own >= 0 && a.reduce) forward.prefetch_parameters(own);
    if (unit.exists() && a.reduce) parameters = forward.reduce(own, exchange);
    if (own >= 0 && !a.reduce) parameters = forward.parameters_of(own);
    if (a.reduce) exchange.template meet<Moments>(unit);
    if (a.reduce && wave == 0 && blockIdx.x == 0 && threadIdx.x == 0 &&
        a.call.running.num_batches_tracked)
      ++*a.call.running.num_batches_tracked;
    Partial<A, 1> total;
    typename Block::Statistics batch = {};
    if (a.apply && a.training) total = exchange.template gather<Moments>(unit);
    if (own >= 0 && a.training) batch = forward.finish(own, parameters, total);
    if (own >= 0 && !a.training) forward.use_running_statistics(own, parameters);
    have_gathered(g.strategy);
    if (own >= 0 && a.training && unit.rank == 0) forward.record(own, batch, momentum);
    if (unit.exists() && a.apply && a.call.y) forward.apply();
    leave(g.strategy);
  }
}

using ForwardKernel = void (*)(ForwardArguments);

// Of a storage type: the kernel for a plan and a kind of activation. Each is instantiated in a file
// of its own.
template <typename T>
ForwardKernel forward_kernel_for(Mapping mapping, Access access, bool smooth) {
  return choose_kernel<ForwardKernel>(mapping, access, smooth, [](auto choice) -> ForwardKernel {
    using Choice = decltype(choice);
    return forward_kernel<T, Choice::kMapping, Choice::kAccess, Choice::kSmooth>;
  });
}

}  // namespace cuda
}  // namespace batchnorm
