// One case against the formulas in double.
#pragma once

#include <vector>

#include "calls.h"
#include "formulas.h"

namespace check {

class Formulas {
 public:
  Formulas(const Case& c, const Data& data)
      : c_(c),
        p_(c.problem),
        data_(data),
        param_(parameter_of(c.activation)),
        u_(compute_unit(c.problem.dtype)) {}

  void check_training() const {
    const Training got = train(c_, data_);
    check_statistics(got);
    check_output(got.y, got.mean, got.invstd);
    if (c_.masked()) check_mask(got);
    check_gradients(got, {});
    check_gradients(got, {true, false, false, false});
    check_gradients(got, {false, false, true, true});
    if (c_.residual) check_gradients(got, {false, true, false, true});
  }

  void check_inference() const {
    const Training got = infer(c_, data_);
    const Tensor &y = got.y, &mean = got.mean, &invstd = got.invstd;
    const cudaError_t error = call([&] {
      return cuda::eval_statistics(data_.running_mean.values(), data_.running_var.values(), kEps,
                                   p_.c, mean.device_doubles(), invstd.device_doubles(), nullptr);
    });
    if (!expect_success(c_, "eval_statistics", error)) return;
    for (std::int64_t k = 0; k < p_.c; ++k) {
      const double wanted = 1 / std::sqrt(data_.running_var[k] + kEps);
      expect_near(c_, "eval mean", k, mean[k], data_.running_mean[k], 0);
      expect_near(c_, "eval invstd", k, invstd[k], wanted, 0x1p-50 * wanted);
    }
    check_output(y, mean, invstd);
    if (c_.masked()) check_mask(got);
    for (const Needs& needs : {Needs{}, Needs{true, false, false, false}}) {
      compare(y, mean, invstd, false, needs,
              differentiate(c_, data_, mean, invstd, nullptr, false, needs));
    }
  }

 private:
  double weight(std::int64_t k) const { return c_.bare ? 1 : data_.weight[k]; }
  double bias(std::int64_t k) const { return c_.bare ? 0 : data_.bias[k]; }

  // Two passes in long double: mean and biased variance.
  void measure(std::vector<double>* means, std::vector<double>* variances) const {
    const auto channels = static_cast<std::size_t>(p_.c);
    const double n = static_cast<double>(p_.per_channel());
    std::vector<long double> sum(channels), square(channels);
    for (std::int64_t i = 0; i < p_.numel(); ++i) sum[c_.channel_of(i)] += data_.x[i];
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const long double d = data_.x[i] - sum[c_.channel_of(i)] / n;
      square[c_.channel_of(i)] += d * d;
    }
    for (std::size_t k = 0; k < channels; ++k) {
      means->push_back(static_cast<double>(sum[k] / n));
      variances->push_back(static_cast<double>(square[k] / n));
    }
  }

  void check_statistics(const Training& got) const {
    std::vector<double> means, variances;
    measure(&means, &variances);
    expect_near(c_, "num_batches_tracked", 0, static_cast<double>(got.batches.value()),
                static_cast<double>(kBatchesBefore + (c_.bare ? 0 : 1)), 0);
    for (std::int64_t k = 0; k < p_.c; ++k) {
      const double v = variances[k];
      // The mean's rounding error is one of the deviations', however large the mean is.
      const double error = 16 * u_ * std::sqrt(v) + 0x1p-52 * std::fabs(means[k]);
      expect_near(c_, "mean", k, got.mean[k], means[k], error);
      expect_near(c_, "variance", k, 1 / (got.invstd[k] * got.invstd[k]) - kEps, v,
                  64 * u_ * (v + kEps));
      check_running(got, k, means[k], error, v);
    }
  }

  void check_running(const Training& got, std::int64_t k, double mean, double error,
                     double variance) const {
    const double n = static_cast<double>(p_.per_channel());
    double momentum = c_.cumulative ? 1.0 / (kBatchesBefore + 1) : kMomentum;
    if (c_.bare) momentum = 0;  // nothing is written
    const double m = (1 - momentum) * data_.running_mean[k] + momentum * mean;
    // One value has no unbiased variance, and moves nothing.
    const double unbiased = n == 1 ? data_.running_var[k] : variance * n / (n - 1);
    const double v = (1 - momentum) * data_.running_var[k] + momentum * unbiased;
    expect_near(c_, "running_mean", k, got.running_mean[k], m, error + rounding(c_.parameters, m));
    expect_near(c_, "running_var", k, got.running_var[k], v,
                64 * u_ * v + rounding(c_.parameters, v));
  }

  double z(std::int64_t i, double mean, double invstd) const {
    const std::int64_t k = c_.channel_of(i);
    return (data_.x[i] - mean) * invstd * weight(k) + bias(k) +
           (c_.residual ? data_.residual[i] : 0);
  }
  // How far z may be off: by the rounding of each term, and of the result where it is stored first.
  double z_error(std::int64_t i, double mean, double invstd) const {
    const std::int64_t k = c_.channel_of(i);
    const double terms = std::fabs((data_.x[i] - mean) * invstd * weight(k)) + std::fabs(bias(k)) +
                         (c_.residual ? std::fabs(data_.residual[i]) : 0);
    const double stored =
        is_piecewise_linear(c_.activation) ? unit(p_.dtype) * std::fabs(z(i, mean, invstd)) : 0;
    return 32 * u_ * (terms + std::fabs(weight(k))) + stored;
  }

  void check_output(const Tensor& y, const Tensor& mean, const Tensor& invstd) const {
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const std::int64_t k = c_.channel_of(i);
      const double wanted = activate(c_.activation, z(i, mean[k], invstd[k]), param_);
      const double error = 1.5 * z_error(i, mean[k], invstd[k]) + rounding(p_.dtype, wanted);
      if (!expect_near(c_, "y", i, y[i], wanted, error)) return;
    }
  }

  // Every byte of the mask: bits of elements as forward dropped them, bits beyond a row 0, and
  // bytes that no element owns as they were.
  void check_mask(const Training& got) const {
    const Buffer& mask = got.mask;
    std::vector<unsigned char> wanted(static_cast<std::size_t>(mask.bytes()), kUnwritten);
    const std::int64_t used = expanded_channels(p_) > 0 ? p_.numel() / 8 : mask.bytes();
    std::memset(wanted.data(), 0, static_cast<std::size_t>(used));
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const std::int64_t bit = c_.mask_bit(i);
      const unsigned kept = was_dropped(c_.activation, got.y[i]) ? 0 : 1;
      wanted[bit / 8] = static_cast<unsigned char>(wanted[bit / 8] | kept << bit % 8);
    }
    expect(c_, std::memcmp(wanted.data(), mask.host(), wanted.size()) == 0,
           "the mask has the elements that were kept");
  }

  void check_gradients(const Training& forward, const Needs& needs) const {
    compare(forward.y, forward.mean, forward.invstd, true, needs,
            differentiate(c_, data_, forward, needs));
  }

  // Of one element: dz, and the normalised x.
  struct Element {
    double g, h;
    bool is_kink;
  };
  Element element(std::int64_t i, const Tensor& y, const Tensor& mean, const Tensor& invstd) const {
    const std::int64_t k = c_.channel_of(i);
    const Activation a = c_.activation;
    const double h = (data_.x[i] - mean[k]) * invstd[k];
    if (a == Activation::kIdentity) return {data_.dy[i], h, false};
    if (is_piecewise_linear(a)) {
      const double slope = a == Activation::kLeakyRelu ? param_ : 0;
      return {was_dropped(a, y[i]) ? slope * data_.dy[i] : data_.dy[i], h, false};
    }
    const double at = z(i, mean[k], invstd[k]);
    return {data_.dy[i] * smooth_derivative(a, at, param_), h, is_kink(a, at)};
  }

  // Of a channel: the two sums, of absolute values too, and what kinks may add to them.
  struct Sums {
    double dz = 0, dot = 0, dz_size = 0, dot_size = 0, kinks = 0;
  };

  void compare(const Tensor& y, const Tensor& mean, const Tensor& invstd, bool training,
               const Needs& needs, const Gradients& got) const {
    std::vector<Element> all;
    std::vector<Sums> sums(static_cast<std::size_t>(p_.c));
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const Element e = element(i, y, mean, invstd);
      const double dy = std::fabs(data_.dy[i]);
      Sums& s = sums[c_.channel_of(i)];
      s.dz += e.g, s.dot += e.g * e.h;
      // The derivative's own error is one of about 1, not of its value far from 0.
      const double size = std::fabs(e.g) + 1e-3 * dy;
      s.dz_size += size, s.dot_size += size * std::fabs(e.h);
      if (e.is_kink) s.kinks += 2 * dy * (1 + std::fabs(e.h));
      all.push_back(e);
    }
    for (std::int64_t k = 0; k < p_.c; ++k) compare_sums(k, sums[k], needs, got);
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const std::int64_t k = c_.channel_of(i);
      if (all[i].is_kink) continue;
      if (!compare_element(i, all[i], sums[k], invstd[k] * weight(k), training, needs, got)) return;
    }
  }

  // A derivative in float is off by a few units; so are its sums, in the mean of their terms.
  double each() const { return 64 * u_; }

  void compare_sums(std::int64_t k, const Sums& s, const Needs& needs, const Gradients& got) const {
    const double dz_error = each() * s.dz_size + s.kinks + rounding(c_.parameters, s.dz);
    const double dot_error =
        each() * (s.dot_size + s.dz_size) + s.kinks + rounding(c_.parameters, s.dot);
    if (needs.dbias) expect_near(c_, "dbias", k, got.dbias[k], s.dz, dz_error);
    if (needs.dweight) expect_near(c_, "dweight", k, got.dweight[k], s.dot, dot_error);
  }

  bool compare_element(std::int64_t i, const Element& e, const Sums& s, double scale, bool training,
                       const Needs& needs, const Gradients& got) const {
    const double n = static_cast<double>(p_.per_channel());
    const double g = e.g, size = 1 + std::fabs(e.h);
    const double dx = scale * (training ? g - s.dz / n - e.h * s.dot / n : g);
    const double spread =
        std::fabs(g) + s.dz_size / n + std::fabs(e.h) * s.dot_size / n + s.kinks / n;
    const double dx_error =
        std::fabs(scale) * size * (each() * spread + s.kinks / n) + rounding(p_.dtype, dx);
    const double dz_error = each() * std::fabs(data_.dy[i]) + rounding(p_.dtype, g);
    return (!needs.dx || expect_near(c_, "dx", i, got.dx[i], dx, dx_error)) &&
           (!needs.dresidual || expect_near(c_, "dresidual", i, got.dresidual[i], g, dz_error));
  }

  const Case& c_;
  const Problem& p_;
  const Data& data_;
  const double param_, u_;
};

}  // namespace check
