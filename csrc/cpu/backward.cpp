// The backward pass: two sums per channel, then the gradients.
#include "cpu/reduce.h"

namespace batchnorm {
namespace cpu {
namespace {

template <typename T>
class BackwardOperation {
 public:
  using K = Kernels<T>;
  using A = typename K::A;

  BackwardOperation(const Backward& a, const CpuPlan& plan)
      : a_(a),
        plan_(plan),
        partials_(plan, a.problem.c),
        affine_(a.problem.c),
        input_terms_(2 * input_terms_.padded(a.problem.c)),
        slope_(input_terms_.data()),
        offset_(slope_ + input_terms_.padded(a.problem.c)) {}

  bool reduces() const { return a_.reduces(); }

  void prepare(const Channels& channels) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      affine_.set(c, a_.mean[c], a_.invstd[c], load_value(a_.weight, c, 1),
                  load_value(a_.bias, c, 0));
    }
  }

  void reduce(const Channels& unit, const Part& part, Sight) {
    const Geometry geometry(a_.problem, plan_);
    partials_.clear(part.index, unit);
    if (geometry.planes()) return reduce_runs(geometry, unit, part);
    reduce_rows(geometry, unit, part);
  }

  void settle(const Channels&, Sight) const {}
  Sight next_sight(const Channels&) const { return Sight::kSettled; }

  void finish(const Channels& channels) {
    if (a_.totals) return use_totals(channels);
    if (!reduces()) return;
    const double n = static_cast<double>(a_.problem.per_channel());
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      const Sums sums = partials_.total(c);  // of dz, of dz * (x - center)
      const double invstd = a_.invstd[c];
      const double lost = a_.mean[c] - static_cast<double>(affine_.center[c]);
      const double dz_deviation = sums.second - lost * sums.first;  // sum(dz * (x - mean))
      store_value(a_.dbias, c, sums.first);
      store_value(a_.dweight, c, invstd * dz_deviation);
      set_input_terms(c, sums.first, invstd * dz_deviation, n);
    }
  }

  void apply(const Channels& unit, const Part& part) {
    if (!a_.dx && !a_.dresidual) return;
    const Geometry geometry(a_.problem, plan_);
    const auto& table = kernels<T>().backward[static_cast<int>(a_.activation)];
    const A* const slope = a_.training ? slope_ : nullptr;
    if (geometry.planes()) {
      const auto params = affine_.params(a_.activation_param);
      geometry.for_each_run(
          unit, part, a_.mask != nullptr, /*backwards=*/true, [&](const Run& run) {
            const std::int64_t c = run.channel;
            table[K::kShared](span(run), {at_channel(params, c), at(slope, c), offset_ + c});
          });
    } else {
      const Matrix matrix = geometry.matrix(unit);
      const std::int64_t cols = matrix.cols * geometry.rows_at_once(matrix, a_.mask != nullptr);
      const BackwardParams<A> params{
          affine_.params(a_.activation_param, geometry, unit, cols),
          slope ? per_column(slope, geometry, unit, cols, kSlope) : nullptr,
          slope ? per_column<A>(offset_, geometry, unit, cols, kOffset) : nullptr};
      geometry.for_each_run(unit, part, a_.mask != nullptr, /*backwards=*/true,
                            [&](const Run& run) { table[K::kPerColumn](span(run), params); });
    }
  }

 private:
  void use_totals(const Channels& channels) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      const std::int64_t all = a_.problem.c;
      set_input_terms(c, a_.totals[all + c], a_.totals[c], a_.totals[2 * all]);
    }
  }

  // dx = scale * (dz + (x - center) * slope + offset)
  void set_input_terms(std::int64_t c, double dbias, double dweight, double n) {
    const double lost = a_.mean[c] - static_cast<double>(affine_.center[c]);
    const double slope = -a_.invstd[c] * dweight / n;
    slope_[c] = for_kernels<A>(slope);
    offset_[c] = for_kernels<A>(-dbias / n - lost * slope);
  }

  template <typename Value>
  static Value* at(Value* base, std::int64_t offset) {
    return base ? base + offset : nullptr;
  }
  static const T* at(const void* base, std::int64_t offset) {
    return at(static_cast<const T*>(base), offset);
  }
  static T* at(void* base, std::int64_t offset) { return at(static_cast<T*>(base), offset); }

  BackwardSpan<T> span(const Run& run) const {
    return {at(a_.x, run.offset),
            at(a_.dy, run.offset),
            at(a_.residual, run.offset),
            a_.mask ? a_.mask + run.mask : nullptr,
            at(a_.dx, run.offset),
            at(a_.dresidual, run.offset),
            run.length,
            run.count,
            run.ahead,
            plan_.stream};
  }

  void reduce_runs(const Geometry& geometry, const Channels& unit, const Part& part) {
    const auto params = affine_.params(a_.activation_param);
    const auto kernel = kernels<T>().run_sums[static_cast<int>(a_.activation)];
    sum_runs<T>(geometry, unit, part, a_.mask != nullptr, &partials_,
                [&](const Run& piece, A* kept) {
                  kernel(span(piece), at_channel(params, piece.channel), kept);
                });
  }

  void reduce_rows(const Geometry& geometry, const Channels& unit, const Part& part) {
    const ForwardParams<A> params =
        affine_.params(a_.activation_param, geometry, unit, geometry.matrix(unit).cols);
    const auto kernel = kernels<T>().column_sums[static_cast<int>(a_.activation)];
    BackwardRows<T> rows;
    rows.has_residual = a_.residual != nullptr;
    rows.has_mask = a_.mask != nullptr;
    sum_all_rows<T>(
        geometry, unit, part, &partials_,
        [&](const Chunk& chunk, std::int64_t cols, A* kept, double* first, double* second) {
          for (int i = 0; i < chunk.count; ++i) {
            rows.x[i] = at(a_.x, chunk.offset[i]);
            rows.dy[i] = at(a_.dy, chunk.offset[i]);
            rows.residual[i] = at(a_.residual, chunk.offset[i]);
            if (a_.mask) rows.mask[i] = a_.mask + chunk.mask[i];
          }
          kernel(rows, chunk.count, cols, geometry.group_rows(), params, kept, first, second);
        });
  }

  const Backward& a_;
  const CpuPlan& plan_;
  Partials<Sums> partials_;
  AffineTable<T> affine_;
  AlignedArray<A> input_terms_;
  A *slope_, *offset_;
};

}  // namespace

void backward(const Backward& a, const CpuPlan& plan, const ParallelFor& parallel_for) {
  with_dtype(a.problem.dtype, [&](auto tag) {
    BackwardOperation<decltype(tag)> operation(a, plan);
    run_units(a.problem, plan, parallel_for, operation);
  });
}

}  // namespace cpu
}  // namespace batchnorm
