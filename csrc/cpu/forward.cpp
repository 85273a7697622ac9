// Training and inference forward passes.
#include <cmath>
#include <type_traits>

#include "cpu/reduce.h"

namespace batchnorm {
namespace cpu {
namespace {

double inverse_std(const ChannelValues& variance, std::int64_t c, double eps) {
  return 1 / std::sqrt(load_value(variance, c, 1) + eps);
}

// The counter goes up; what the batch then weighs in the running statistics.
double count_batch(const RunningStatistics& running) {
  if (!running.num_batches_tracked) return running.momentum;
  const std::int64_t batches = ++*running.num_batches_tracked;
  return running.cumulative_average ? 1.0 / static_cast<double>(batches) : running.momentum;
}

void move(const ChannelValues& running, std::int64_t c, double batch, double momentum) {
  if (!running.data) return;
  store_value(running, c, (1 - momentum) * load_value(running, c, 0) + momentum * batch);
}

void move(const RunningStatistics& running, std::int64_t c, const Moments& batch, double momentum) {
  if (!running.are_moved_by(batch)) return;
  move(running.mean, c, batch.mean, momentum);
  if (batch.count > 1) move(running.var, c, batch.m2 / (batch.count - 1), momentum);
}

// Writes y = act(z) for a part of a unit.
template <typename T, typename Arguments>
void write_forward(const Arguments& a, std::uint8_t* mask, const CpuPlan& plan,
                   const AffineTable<T>& affine, const Channels& unit, const Part& part,
                   bool backwards) {
  using K = Kernels<T>;
  const Geometry geometry(a.problem, plan);
  const auto& table = kernels<T>().forward[static_cast<int>(a.activation)];
  const T* const x = static_cast<const T*>(a.x);
  const T* const residual = static_cast<const T*>(a.residual);
  T* const y = static_cast<T*>(a.y);
  const auto span = [&](const Run& run) {
    return ForwardSpan<T>{x + run.offset, residual ? residual + run.offset : nullptr,
                          y + run.offset, mask ? mask + run.mask : nullptr,
                          run.length,     run.count,
                          run.ahead,      plan.stream};
  };
  if (geometry.planes()) {
    const auto params = affine.params(a.activation_param);
    geometry.for_each_run(unit, part, mask != nullptr, backwards, [&](const Run& run) {
      table[K::kShared](span(run), at_channel(params, run.channel));
    });
  } else {
    const Matrix matrix = geometry.matrix(unit);
    const std::int64_t cols = matrix.cols * geometry.rows_at_once(matrix, mask != nullptr);
    const auto params = affine.params(a.activation_param, geometry, unit, cols);
    geometry.for_each_run(unit, part, mask != nullptr, backwards,
                          [&](const Run& run) { table[K::kPerColumn](span(run), params); });
  }
}

template <typename T>
class TrainOperation {
 public:
  using A = Accumulate<T>;

  TrainOperation(const ForwardTrain& a, const CpuPlan& plan)
      : a_(a),
        plan_(plan),
        partials_(plan, a.problem.c),
        affine_(a.problem.c),
        shift_(a.problem.c),
        sights_(static_cast<std::size_t>(a.problem.c)),
        moments_(static_cast<std::size_t>(a.problem.c)) {
    momentum_ = count_batch(a.running);
  }

  bool reduces() const { return true; }

  void prepare(const Channels& channels) {
    const Geometry geometry(a_.problem, plan_);
    const T* const x = static_cast<const T*>(a_.x);
    if (geometry.planes()) {
      kernels<T>().run_heads(x + channels.begin * a_.problem.s, a_.problem.s, channels.count(),
                             shift_.data() + channels.begin);
    } else {
      prepare_columns(geometry, channels);
    }
  }

  void reduce(const Channels& unit, const Part& part, Sight sight) {
    const Geometry geometry(a_.problem, plan_);
    partials_.clear(part.index, unit);
    const T* const x = static_cast<const T*>(a_.x);
    const A scale = static_cast<A>(scale_of(sight));
    if (geometry.planes()) {
      const auto kernel = kernels<T>().run_moments;
      sum_runs<T>(geometry, unit, part, /*masked=*/false, &partials_,
                  [&](const Run& piece, A* kept) {
                    kernel(x + piece.offset, piece.length, piece.count,
                           {shift_.data() + piece.channel, scale}, kept);
                  });
      return;
    }
    const auto kernel = kernels<T>().column_moments;
    const std::int64_t columns = geometry.matrix(unit).cols;
    const A* const shift = per_column<A>(shift_.data(), geometry, unit, columns, kShift);
    sum_all_rows<T>(
        geometry, unit, part, &partials_,
        [&](const Chunk& chunk, std::int64_t cols, A* kept, double* first, double* second) {
          const T* rows[kChunkRows];
          for (int i = 0; i < chunk.count; ++i) rows[i] = x + chunk.offset[i];
          kernel(rows, chunk.count, cols, geometry.group_rows(), {shift, scale}, kept, first,
                 second);
        });
  }

  void settle(const Channels& channels, Sight sight) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      Sight& needs = sights_[static_cast<std::size_t>(c)];
      if (needs == sight) needs = settle_channel(c, sight);
    }
  }

  Sight next_sight(const Channels& unit) const {
    return *std::min_element(sights_.data() + unit.begin, sights_.data() + unit.end);
  }

  void finish(const Channels& channels) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      const Moments& m = moments_[static_cast<std::size_t>(c)];
      const double invstd = 1 / std::sqrt(m.variance() + a_.eps);
      a_.mean[c] = m.mean;
      if (a_.invstd) a_.invstd[c] = invstd;
      if (a_.m2) a_.m2[c] = m.m2;
      affine_.set(c, m.mean, invstd, load_value(a_.weight, c, 1), load_value(a_.bias, c, 0));
      move(a_.running, c, m, momentum_);
    }
  }

  void apply(const Channels& unit, const Part& part) {
    if (a_.y) write_forward<T>(a_, a_.mask, plan_, affine_, unit, part, /*backwards=*/true);
  }

 private:
  // So that squares of any float32 differences can be summed up; a power of two rounds nothing.
  static double scale_of(Sight sight) {
    return sight == Sight::kReduced || sight == Sight::kReducedFromMean ? 0x1p-80 : 1;
  }

  // K from the first rows; of a channel that has many columns, from some of them.
  void prepare_columns(const Geometry& geometry, const Channels& channels) {
    constexpr std::int64_t kHeadColumns = 8;
    const Matrix m = geometry.matrix(channels);
    const int count = static_cast<int>(std::min<std::int64_t>(m.rows, kHeadRows));
    const T* rows[kHeadRows];
    for (int i = 0; i < count; ++i) rows[i] = static_cast<const T*>(a_.x) + m.offset + i * m.stride;
    A* const heads = scratch<A>(kShift, m.cols);
    kernels<T>().column_heads(rows, count, m.cols, heads);
    for (std::int64_t c = 0; c < channels.count(); ++c) {
      const auto columns = geometry.columns_of(c, channels, m.cols);
      const std::int64_t some = std::min(columns.count, kHeadColumns);
      const A* const first = heads + columns.first;
      A differences = 0;
      for (std::int64_t j = 1; j < some; ++j) differences += first[j * columns.step] - *first;
      shift_.data()[channels.begin + c] = *first + differences / static_cast<A>(some);
    }
  }

  // The channel's moments, or what its sums have to be taken with once more: sum(d^2) may be 8
  // times what is left of it (docs/decisions/0002).
  Sight settle_channel(std::int64_t c, Sight sight) {
    constexpr double kMostLost = 7.0 / 8;
    const Sums sums = partials_.total(c);
    const double n = static_cast<double>(a_.problem.per_channel());
    const double scale = scale_of(sight), offset = sums.first / n;
    A& shift = shift_.data()[c];
    if (std::is_same_v<A, float> && scale == 1 && !std::isfinite(sums.second)) {
      shift = 0;
      return Sight::kReduced;
    }
    const bool at_head = sight == Sight::kHead || sight == Sight::kReduced;
    if (at_head && sums.first * offset > kMostLost * sums.second) {
      shift += static_cast<A>(offset / scale);
      return sight == Sight::kHead ? Sight::kMean : Sight::kReducedFromMean;
    }
    const double squares = sums.second - sums.first * offset;
    moments_[static_cast<std::size_t>(c)] = {static_cast<double>(shift) + offset / scale,
                                             squares < 0 ? 0 : squares / (scale * scale), n};
    return Sight::kSettled;
  }

  const ForwardTrain& a_;
  const CpuPlan& plan_;
  Partials<Sums> partials_;
  AffineTable<T> affine_;
  AlignedArray<A> shift_;  // K of each channel
  std::vector<Sight> sights_;
  std::vector<Moments> moments_;
  double momentum_;
};

template <typename T>
class EvalOperation {
 public:
  EvalOperation(const ForwardEval& a, const CpuPlan& plan)
      : a_(a), plan_(plan), affine_(a.problem.c) {}

  bool reduces() const { return false; }
  void prepare(const Channels&) {}
  void reduce(const Channels&, const Part&, Sight) {}
  void settle(const Channels&, Sight) const {}
  Sight next_sight(const Channels&) const { return Sight::kSettled; }
  void finish(const Channels& channels) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      affine_.set(c, load_value(a_.running_mean, c, 0), inverse_std(a_.running_var, c, a_.eps),
                  load_value(a_.weight, c, 1), load_value(a_.bias, c, 0));
    }
  }
  void apply(const Channels& unit, const Part& part) {
    write_forward<T>(a_, a_.mask, plan_, affine_, unit, part, /*backwards=*/false);
  }

 private:
  const ForwardEval& a_;
  const CpuPlan& plan_;
  AffineTable<T> affine_;
};

}  // namespace

void forward_train(const ForwardTrain& a, const CpuPlan& plan, const ParallelFor& parallel_for) {
  with_dtype(a.problem.dtype, [&](auto tag) {
    TrainOperation<decltype(tag)> operation(a, plan);
    run_units(a.problem, plan, parallel_for, operation);
  });
}

void forward_eval(const ForwardEval& a, const CpuPlan& plan, const ParallelFor& parallel_for) {
  with_dtype(a.problem.dtype, [&](auto tag) {
    EvalOperation<decltype(tag)> operation(a, plan);
    run_units(a.problem, plan, parallel_for, operation);
  });
}

void combine_moments(const CombineMoments& a) {
  const double momentum = count_batch(a.running);
  for (std::int64_t c = 0; c < a.c; ++c) {
    const Moments all = a.of_channel(c);
    a.mean[c] = all.mean;
    a.var[c] = all.variance();
    a.invstd[c] = 1 / std::sqrt(a.var[c] + a.eps);
    move(a.running, c, all, momentum);
  }
  *a.count = a.count_of_all();
}

void eval_statistics(const ChannelValues& running_mean, const ChannelValues& running_var,
                     double eps, std::int64_t c, double* mean, double* invstd) {
  for (std::int64_t i = 0; i < c; ++i) {
    mean[i] = load_value(running_mean, i, 0);
    invstd[i] = inverse_std(running_var, i, eps);
  }
}

}  // namespace cpu
}  // namespace batchnorm
