// Training and inference forward passes.
#include <cmath>

#include "cpu/units.h"

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
  TrainOperation(const ForwardTrain& a, const CpuPlan& plan)
      : a_(a), plan_(plan), partials_(plan, a.problem.c), affine_(a.problem.c) {
    momentum_ = count_batch(a.running);
  }

  bool reduces() const { return true; }
  void prepare(const Channels&) {}

  void reduce(const Channels& unit, const Part& part) {
    const Geometry geometry(a_.problem, plan_);
    for (std::int64_t c = unit.begin; c < unit.end; ++c) partials_.at(part.index, c) = Moments{};
    if (geometry.planes()) return reduce_runs(geometry, unit, part);
    const Matrix matrix = geometry.matrix(unit), rest = geometry.rest(unit);
    reduce_rows(geometry, unit, matrix, part.begin(matrix.rows), part.end(matrix.rows), part);
    if (part.is_last()) reduce_rows(geometry, unit, rest, 0, rest.rows, part);
  }

  void finish(const Channels& channels) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      Moments m;
      for (std::int64_t part = 0; part < partials_.parts(); ++part) {
        m = combine(m, partials_.at(part, c));
      }
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
  void reduce_runs(const Geometry& geometry, const Channels& unit, const Part& part) {
    const T* const x = static_cast<const T*>(a_.x);
    const auto kernel = kernels<T>().run_moments;
    geometry.for_each_run(unit, part, /*masked=*/false, /*backwards=*/false, [&](const Run& run) {
      for_each_piece(run, [&](const Run& piece) {
        kernel(x + piece.offset, piece.length, piece.count,
               &partials_.at(part.index, piece.channel));
      });
    });
  }

  void reduce_rows(const Geometry& geometry, const Channels& unit, const Matrix& matrix,
                   std::int64_t begin, std::int64_t end, const Part& part) {
    if (begin >= end) return;
    double* const mean = scratch<double>(kFirstSum, matrix.cols);
    double* const m2 = scratch<double>(kSecondSum, matrix.cols);
    std::fill_n(mean, matrix.cols, 0.0);
    std::fill_n(m2, matrix.cols, 0.0);
    const T* const x = static_cast<const T*>(a_.x);
    const auto kernel = kernels<T>().column_moments;
    auto* const sums = scratch<Accumulate<T>>(kChunkSums, column_scratch(matrix.cols));
    double rows = 0;
    for_each_chunk(matrix, begin, end, [&](const Chunk& chunk) {
      const T* pointers[kChunkRows];
      for (int i = 0; i < chunk.count; ++i) pointers[i] = x + chunk.offset[i];
      kernel(pointers, chunk.count, matrix.cols, sums, rows, mean, m2);
      rows += chunk.count;
    });
    for (std::int64_t c = 0; c < unit.count(); ++c) {
      const auto columns = geometry.columns_of(c, unit, matrix.cols);
      Moments& total = partials_.at(part.index, unit.begin + c);
      total = combine(total, combine_equal(mean + columns.first, m2 + columns.first, columns.count,
                                           columns.step, rows));
    }
  }

  const ForwardTrain& a_;
  const CpuPlan& plan_;
  Partials<Moments> partials_;
  AffineTable<T> affine_;
  double momentum_;
};

template <typename T>
class EvalOperation {
 public:
  EvalOperation(const ForwardEval& a, const CpuPlan& plan)
      : a_(a), plan_(plan), affine_(a.problem.c) {}

  bool reduces() const { return false; }
  void prepare(const Channels&) {}
  void reduce(const Channels&, const Part&) {}
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
