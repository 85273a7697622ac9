// What must hold exactly, whatever the numbers are.
#pragma once

#include <limits>

#include "calls.h"
#include "formulas.h"

namespace check {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The order in which threads and blocks run changes no bit. What the driver said of a kernel is
// not asked again.
inline void check_determinism(const Case& c, const Data& data, std::uint64_t seed) {
  const Training one = train(c, data);
  const Gradients of_one = differentiate(c, data, one);
  set_order(~seed);
  const std::uint64_t questions = driver().questions;
  const Training other = train(c, data);
  expect(c, one.is_same_as(other), "forward_train gives the same bits in every order");
  expect(c, of_one.is_same_as(differentiate(c, data, other)),
         "backward gives the same bits in every order");
  expect(c, driver().questions == questions, "a kernel's second call asks nothing");
}

// What happens in one channel changes no bit of another.
inline void expect_same_elsewhere(const Case& c, std::int64_t channel, const Training& a,
                                  const Training& b) {
  bool same = true;
  for (std::int64_t i = 0; i < c.problem.numel(); ++i) {
    if (c.channel_of(i) == channel) continue;
    same &= a.y.is_same_at(i, b.y) && (!c.masked() || a.kept(c, i) == b.kept(c, i));
  }
  for (std::int64_t k = 0; k < c.problem.c; ++k) {
    if (k == channel) continue;
    same &= a.mean.is_same_at(k, b.mean) && a.invstd.is_same_at(k, b.invstd) &&
            a.running_mean.is_same_at(k, b.running_mean) &&
            a.running_var.is_same_at(k, b.running_var);
  }
  expect(c, same, "forward_train keeps channels apart");
}
inline void expect_same_elsewhere(const Case& c, std::int64_t channel, const Gradients& a,
                                  const Gradients& b) {
  bool same = true;
  for (std::int64_t i = 0; i < c.problem.numel(); ++i) {
    if (c.channel_of(i) == channel) continue;
    same &= a.dx.is_same_at(i, b.dx) && a.dresidual.is_same_at(i, b.dresidual);
  }
  for (std::int64_t k = 0; k < c.problem.c; ++k) {
    if (k == channel) continue;
    same &= a.dweight.is_same_at(k, b.dweight) && a.dbias.is_same_at(k, b.dbias);
  }
  expect(c, same, "backward keeps channels apart");
}

// nan or an infinity in one element of x: the channel is nan, the others do not change. Gradients
// of the piecewise-linear activations are torch's: relu and relu6 keep where z is nan, leaky_relu
// does not.
inline void check_poisoned_input(const Case& c, Data& data, std::int64_t at, double poison) {
  const Training before = train(c, data);
  const Gradients gradients_before = differentiate(c, data, before);
  data.x.put(at, poison);
  const Training after = train(c, data);
  const Gradients gradients = differentiate(c, data, after);
  const std::int64_t channel = c.channel_of(at);
  expect_same_elsewhere(c, channel, before, after);
  expect_same_elsewhere(c, channel, gradients_before, gradients);
  const double slope = c.activation == Activation::kLeakyRelu ? parameter_of(c.activation) : 1;
  bool is_nan = !std::isfinite(after.mean[channel]) && std::isnan(after.invstd[channel]);
  bool is_torchs = true;
  for (std::int64_t i = 0; i < c.problem.numel(); ++i) {
    if (c.channel_of(i) != channel) continue;
    is_nan &= std::isnan(after.y[i]) && std::isnan(gradients.dx[i]);
    if (!is_piecewise_linear(c.activation)) continue;
    const double wanted = data.dy[i] * slope;
    is_torchs &= std::fabs(gradients.dresidual[i] - wanted) <= rounding(c.problem.dtype, wanted);
  }
  expect(c, is_nan, "a channel with nan is nan");
  const Training skipped = train(c, data, /*skip_nonfinite=*/true);
  expect_same_elsewhere(c, channel, after, skipped);
  expect(c,
         skipped.running_mean[channel] == data.running_mean[channel] &&
             skipped.running_var[channel] == data.running_var[channel],
         "a channel that is not finite leaves its running statistics alone");
  expect(c, is_torchs, "the gradient where z is nan is torch's");
}

// The same of dy.
inline void check_poisoned_gradient(const Case& c, Data& data, std::int64_t at, double poison) {
  const Training forward = train(c, data);
  const Gradients before = differentiate(c, data, forward);
  data.dy.put(at, poison);
  const Gradients after = differentiate(c, data, forward);
  expect_same_elsewhere(c, c.channel_of(at), before, after);
}

// dz of dy = 1 at a kink, as torch has it: neither relu nor relu6 keeps its bounds.
inline double derivative_at_kink(Activation activation) {
  return activation == Activation::kLeakyRelu ? parameter_of(activation) : 0;
}

// A channel of equal values: its mean is that value, its variance 0, without any error. So z is
// exactly the bias, and the piecewise-linear activations are asked for their bounds.
inline void check_constant_channel(const Case& c, Data& data, std::int64_t channel, double value) {
  const double bias = c.bare || c.activation != Activation::kRelu6 ? 0 : 6;
  data.bias.put(channel, bias);
  for (std::int64_t i = 0; i < c.problem.numel(); ++i) {
    if (c.channel_of(i) != channel) continue;
    data.x.put(i, value);
    data.residual.put(i, 0);
    data.dy.put(i, 1);
  }
  const Training got = train(c, data);
  const Gradients gradients = differentiate(c, data, got);
  double mean = 0;
  bool is_exact = true;
  for (std::int64_t i = 0; i < c.problem.numel(); ++i) {
    if (c.channel_of(i) != channel) continue;
    mean = data.x[i];
    is_exact &= got.y[i] == bias;
    if (!is_piecewise_linear(c.activation)) continue;
    is_exact &= gradients.dresidual[i] == derivative_at_kink(c.activation);
  }
  expect_near(c, "mean of a constant channel", channel, got.mean[channel], mean, 0);
  expect_near(c, "invstd of a constant channel", channel, got.invstd[channel], 1 / std::sqrt(kEps),
              0);
  expect(c, is_exact, "a constant channel is the bias, and dropped at a bound");
}

// One value for each channel has no unbiased variance: the running one stays as it was.
inline void check_single_values(const Case& c, const Data& data) {
  const Training got = train(c, data);
  bool has_stayed = true, has_moved = c.bare;
  for (std::int64_t k = 0; k < c.problem.c; ++k) {
    has_stayed &= c.bare || got.running_var[k] == data.running_var[k];
    has_moved |= got.running_mean[k] != data.running_mean[k];
  }
  expect(c, has_stayed && has_moved, "one value moves the running mean alone");
}

// This data as that of two ranks, with a third that has none between them: what they have together
// is what one has, but for the count.
class Ranks {
 public:
  Ranks(const Case& c, const Data& data)
      : c_(c),
        data_(data),
        channels_(c.problem.c),
        width_(2 * channels_ + 1),
        n_(static_cast<double>(c.problem.per_channel())),
        one_(train(c, data)) {}

  void check_statistics() const {
    Tensor parts(DType::kDouble, 3 * width_);
    Training to(c_);
    to.running_mean.copy_from(data_.running_mean);
    to.running_var.copy_from(data_.running_var);
    ForwardTrain call = training_call(c_, data_, &to);
    const RunningStatistics running = call.running;
    call.y = nullptr;
    call.mask = nullptr;
    call.running = {};
    call.mean = parts.device_doubles();
    call.invstd = nullptr;
    call.m2 = parts.device_doubles() + channels_;
    make(c_, "statistics alone", call);
    parts.put(2 * channels_, n_);
    for (std::int64_t i = 0; i < width_; ++i) {
      parts.put(width_ + i, 0);
      parts.put(2 * width_ + i, parts[i]);
    }
    const Tensor var(DType::kDouble, channels_), count(DType::kDouble, 1);
    const CombineMoments all{3,
                             channels_,
                             parts.device_doubles(),
                             running,
                             kEps,
                             to.mean.device_doubles(),
                             var.device_doubles(),
                             to.invstd.device_doubles(),
                             count.device_doubles()};
    expect_success(c_, "combine_moments",
                   check::call([&] { return cuda::combine_moments(all, nullptr); }));
    expect(c_, to.is_intact() && var.is_intact() && count.is_intact(), "it writes nothing else");
    expect_near(c_, "count of all", 0, count[0], 2 * n_, 0);
    const bool counts = running.num_batches_tracked != nullptr;
    const std::int64_t batches = to.batches.value();
    expect(c_, batches == one_.batches.value(), "the counter goes up by one");
    const double momentum =
        counts && c_.cumulative ? 1.0 / static_cast<double>(batches) : kMomentum;
    for (std::int64_t k = 0; k < channels_; ++k) {
      const double m2 = 2 * parts[channels_ + k];
      expect_near(c_, "mean of all", k, to.mean[k], one_.mean[k], 1e-5 * std::fabs(one_.mean[k]));
      expect_near(c_, "invstd of all", k, to.invstd[k], one_.invstd[k], 1e-5 * one_.invstd[k]);
      expect_near(c_, "variance of all", k, var[k], m2 / (2 * n_), 1e-12 * var[k]);
      if (!counts) continue;
      const double moved = (1 - momentum) * data_.running_var[k] + momentum * m2 / (2 * n_ - 1);
      expect_near(c_, "running_var of all", k, to.running_var[k], moved,
                  2 * rounding(c_.parameters, moved));
    }
  }

  void check_gradients() const {
    Tensor totals(DType::kDouble, width_);
    Gradients one(c_), all(c_);
    Backward call = backward_call(&one);
    call.dweight = {totals.device(), DType::kDouble, 1};
    call.dbias = {totals.device_doubles() + channels_, DType::kDouble, 1};
    launch("sums", call);
    for (std::int64_t i = 0; i < 2 * channels_; ++i) totals.put(i, 2 * totals[i]);
    totals.put(2 * channels_, 2 * n_);
    call = backward_call(&all);
    call.totals = totals.device_doubles();
    launch("backward with totals", call);
    double largest = 0;
    for (std::int64_t i = 0; i < c_.problem.numel(); ++i) {
      largest = std::max(largest, std::fabs(one.dx[i]));
    }
    for (std::int64_t i = 0; i < c_.problem.numel(); ++i) {
      expect_near(c_, "dx of all", i, all.dx[i], one.dx[i],
                  2 * rounding(c_.problem.dtype, one.dx[i]) + 1e-5 * largest);
    }
  }

 private:
  void launch(const char* what, const Backward& call) const { make(c_, what, call); }
  Backward backward_call(Gradients* to) const {
    Backward call = gradient_call(c_, data_, one_.mean, one_.invstd,
                                  c_.masked() ? &one_.mask : nullptr, true, {}, to);
    call.dresidual = nullptr;
    call.dweight = call.dbias = {};
    return call;
  }

  const Case& c_;
  const Data& data_;
  std::int64_t channels_, width_;
  double n_;
  const Training one_;
};

// Which of them are checked, and where, is drawn.
inline void check_properties(const Case& c, Data& data, std::mt19937_64& random,
                             std::uint64_t seed) {
  constexpr double kPoisons[] = {kNan, kInfinity, -kInfinity};
  const auto at =
      static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(c.problem.numel()));
  const double poison = kPoisons[random() % 3];
  switch (random() % 6) {
    case 0:
      return check_determinism(c, data, seed);
    case 1:
      return check_poisoned_input(c, data, at, poison);
    case 2:
      return check_poisoned_gradient(c, data, at, poison);
    case 3:
      return Ranks(c, data).check_statistics();
    case 4:
      return Ranks(c, data).check_gradients();
    default:
      return check_constant_channel(c, data, c.channel_of(at), 0.1 * (c.mean + 3));
  }
}

}  // namespace check
