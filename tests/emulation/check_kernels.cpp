// The CUDA kernels against the formulas in double precision, on the emulated device.
//
// Every combination of pass, strategy, dtype, layout, kind of access and activation, on shapes that
// are small and odd. Called with a part of them, "k/n", and a seed; prints what is wrong, and how
// many checks were done.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/batchnorm.h"
#include "cuda/cell.cuh"
#include "emulation.h"

namespace {

using namespace batchnorm;

constexpr const char* kDTypeNames[] = {"float32", "float64", "bfloat16", "float16"};

// ---- stored values ------------------------------------------------------------------------------

double get(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kFloat:
      return static_cast<const float*>(data)[i];
    case DType::kDouble:
      return static_cast<const double*>(data)[i];
    case DType::kBFloat16:
      return cuda::widen(static_cast<const BFloat16*>(data)[i]);
    default:
      return cuda::widen(static_cast<const Half*>(data)[i]);
  }
}

void set(void* data, DType dtype, std::int64_t i, double value) {
  const float rounded = static_cast<float>(value);
  BFloat16 bf16[2];
  Half half[2];
  switch (dtype) {
    case DType::kFloat:
      static_cast<float*>(data)[i] = rounded;
      return;
    case DType::kDouble:
      static_cast<double*>(data)[i] = value;
      return;
    case DType::kBFloat16:
      cuda::narrow(rounded, rounded, bf16);
      static_cast<BFloat16*>(data)[i] = bf16[0];
      return;
    default:
      cuda::narrow(rounded, rounded, half);
      static_cast<Half*>(data)[i] = half[0];
  }
}

// Relative distance of neighbouring values, and of those that are computed with.
double unit(DType dtype) {
  constexpr double kUnits[] = {0x1p-23, 0x1p-52, 0x1p-7, 0x1p-10};
  return kUnits[static_cast<int>(dtype)];
}
// What is lost at least near 0, where float16 has no more digits.
double smallest(DType dtype) { return dtype == DType::kHalf ? 0x1p-25 : 0x1p-133; }
double compute_unit(DType dtype) { return dtype == DType::kDouble ? 0x1p-52 : 0x1p-23; }

// Exactly as large as asked for, so that AddressSanitizer sees the next byte; `shift` elements off
// an aligned address. Filled with bytes of 0xff: nan.
class Tensor {
 public:
  Tensor(DType dtype, std::int64_t count, int shift = 0)
      : dtype_(dtype), count_(count), shift_(shift * size_of(dtype)) {
    const std::size_t bytes = static_cast<std::size_t>(count * size_of(dtype) + shift_);
    memory_.reset(static_cast<char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16)));
    exact_.reset(
        static_cast<char*>(std::malloc(bytes)));  // 16-byte aligned, as malloc's blocks are
    std::memset(exact_.get(), 0xff, bytes);
  }
  void* data() const { return exact_.get() + shift_; }
  double operator[](std::int64_t i) const { return get(data(), dtype_, i); }
  void put(std::int64_t i, double value) { set(data(), dtype_, i, value); }
  std::int64_t count() const { return count_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  DType dtype_;
  std::int64_t count_;
  int shift_;
  std::unique_ptr<char, Free> memory_, exact_;
};

// ---- cases --------------------------------------------------------------------------------------

struct Case {
  Problem problem;
  Activation activation;
  bool residual;
  int shift;        // elements off an aligned address
  double mean;      // of the data, in standard deviations
  bool cumulative;  // momentum=None
  DType parameters;
  CudaPlanOverride forced;
  std::string device;

  std::string name() const {
    char text[256];
    std::snprintf(text, sizeof(text),
                  "%s %s n=%lld c=%lld s=%lld %s%s shift=%d mean=%g %sstrategy=%d team=%d slots=%d "
                  "units_at_once=%lld access=%d width=%lld %s",
                  problem.layout == Layout::kChannelsFirst ? "first" : "last",
                  kDTypeNames[static_cast<int>(problem.dtype)], static_cast<long long>(problem.n),
                  static_cast<long long>(problem.c), static_cast<long long>(problem.s),
                  kActivationNames[static_cast<int>(activation)], residual ? "+residual" : "",
                  shift, mean, cumulative ? "cumulative " : "", forced.strategy, forced.team,
                  forced.slots, static_cast<long long>(forced.units_at_once), forced.access,
                  static_cast<long long>(forced.unit_channels), device.c_str());
    return text;
  }
};

long long checks = 0, failures = 0;

bool expect_near(const Case& c, const char* what, std::int64_t at, double got, double wanted,
                 double tolerance) {
  ++checks;
  if (std::fabs(got - wanted) <= tolerance) return true;
  if (++failures <= 40) {
    std::printf("%s: %s[%lld] is %.9g, not %.9g (+- %.2g)\n", c.name().c_str(), what,
                static_cast<long long>(at), got, wanted, tolerance);
  }
  return false;
}

bool succeeded(const Case& c, const char* what, cudaError_t error) {
  ++checks;
  if (error == cudaSuccess) return true;
  ++failures;
  std::printf("%s: %s returned %d\n", c.name().c_str(), what, static_cast<int>(error));
  return false;
}

// ---- the formulas, in double --------------------------------------------------------------------

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

double activate(Activation a, double z, double param) {
  switch (a) {
    case Activation::kRelu:
      return std::fmax(z, 0);
    case Activation::kRelu6:
      return std::fmin(std::fmax(z, 0), 6);
    case Activation::kLeakyRelu:
      return z > 0 ? z : param * z;
    case Activation::kElu:
      return z > 0 ? z : param * std::expm1(z);
    case Activation::kSilu:
      return z * sigmoid(z);
    case Activation::kGelu:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return z * sigmoid(2 * std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z));
    case Activation::kHardswish:
      return z * std::fmin(std::fmax(z + 3, 0), 6) / 6;
    default:
      return z;
  }
}

double smooth_derivative(Activation a, double z, double param) {
  const double s = sigmoid(z), density = std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
  const double k = 2 * std::sqrt(2 / M_PI), gate = sigmoid(k * (z + 0.044715 * z * z * z));
  switch (a) {
    case Activation::kElu:
      return z > 0 ? 1 : param * std::exp(z);
    case Activation::kSilu:
      return s + z * s * (1 - s);
    case Activation::kGelu:
      return 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * density;
    case Activation::kGeluTanh:
      return gate + z * gate * (1 - gate) * k * (1 + 3 * 0.044715 * z * z);
    default:
      return z <= -3 ? 0 : z >= 3 ? 1 : (2 * z + 3) / 6;
  }
}

bool is_kink(Activation a, double z) {
  return a == Activation::kHardswish ? std::fabs(std::fabs(z) - 3) < 1e-3
                                     : a == Activation::kElu && std::fabs(z) < 1e-3;
}

// Whether the forward pass dropped the element, by what it wrote.
bool was_dropped(Activation a, double y) { return y <= 0 || (a == Activation::kRelu6 && y >= 6); }

// ---- one case -----------------------------------------------------------------------------------

DeviceLimits limits() {
  DeviceLimits found;
  if (cuda::device_limits(0, &found) != cudaSuccess) std::abort();
  return found;
}

class Run {
 public:
  Run(const Case& c, std::mt19937_64& random)
      : c_(c),
        p_(c.problem),
        param_(c.activation == Activation::kElu ? 1.5 : 0.25),
        x_(make(c.shift)),
        r_(make(c.shift)),
        y_(make(c.shift)),
        dy_(make(c.shift)),
        dx_(make(c.shift)),
        dr_(make(c.shift)),
        weight_(c.parameters, p_.c),
        bias_(c.parameters, p_.c),
        running_mean_(c.parameters, p_.c),
        running_var_(c.parameters, p_.c),
        dweight_(c.parameters, p_.c),
        dbias_(c.parameters, p_.c),
        mean_(DType::kDouble, p_.c),
        invstd_(DType::kDouble, p_.c),
        mask_(static_cast<std::size_t>(mask_rows(p_) * mask_row_bytes(p_)), 0xff),
        oracle_mean_(static_cast<std::size_t>(p_.c)),
        oracle_var_(static_cast<std::size_t>(p_.c)) {
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const double spread = 0.5 + static_cast<double>(channel_of(i) % 3);
      x_.put(i, spread * (normal(random) + c.mean));
      r_.put(i, normal(random));
      dy_.put(i, normal(random) + 0.25);
    }
    for (std::int64_t i = 0; i < p_.c; ++i) {
      weight_.put(i, 1 + 0.5 * normal(random));
      bias_.put(i, normal(random));
      running_mean_.put(i, normal(random));
      running_var_.put(i, 0.5 + std::fabs(normal(random)));
      dweight_.put(i, 0);
      dbias_.put(i, 0);
    }
    measure();
  }

  void check() {
    check_training();
    check_inference();
  }

 private:
  Tensor make(int shift) const { return Tensor(p_.dtype, p_.numel(), shift); }
  std::int64_t channel_of(std::int64_t i) const {
    return p_.layout == Layout::kChannelsFirst ? i / p_.s % p_.c : i % p_.c;
  }
  ChannelValues values(const Tensor& tensor) const { return {tensor.data(), c_.parameters, 1}; }
  bool masked() const { return c_.residual && is_piecewise_linear(c_.activation); }

  void measure() {
    const double n = static_cast<double>(p_.per_channel());
    std::vector<long double> sum(static_cast<std::size_t>(p_.c));
    for (std::int64_t i = 0; i < p_.numel(); ++i) sum[channel_of(i)] += x_[i];
    for (std::int64_t k = 0; k < p_.c; ++k) oracle_mean_[k] = static_cast<double>(sum[k] / n);
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const double d = x_[i] - oracle_mean_[channel_of(i)];
      oracle_var_[channel_of(i)] += d * d / n;
    }
  }

  template <typename Call>
  CudaPlan plan_of(const Call& call) const {
    return plan_cuda(cuda::request_of(call), limits(), c_.forced);
  }
  static std::vector<char> workspace_of(const CudaPlan& plan) {
    return std::vector<char>(static_cast<std::size_t>(plan.workspace_bytes) + 16, '\xff');
  }

  void check_training() {
    std::int64_t batches = 3;
    std::vector<double> old_mean, old_var;
    for (std::int64_t i = 0; i < p_.c; ++i) {
      old_mean.push_back(running_mean_[i]);
      old_var.push_back(running_var_[i]);
    }
    const ForwardTrain call{p_,
                            x_.data(),
                            c_.residual ? r_.data() : nullptr,
                            y_.data(),
                            masked() ? mask_.data() : nullptr,
                            values(weight_),
                            values(bias_),
                            values(running_mean_),
                            values(running_var_),
                            &batches,
                            0.125,
                            c_.cumulative,
                            kEps,
                            c_.activation,
                            param_,
                            static_cast<double*>(mean_.data()),
                            static_cast<double*>(invstd_.data())};
    const CudaPlan plan = plan_of(call);
    std::vector<char> workspace = workspace_of(plan);
    if (!succeeded(c_, "forward_train", cuda::forward_train(call, plan, workspace.data(), nullptr)))
      return;
    expect_near(c_, "num_batches_tracked", 0, static_cast<double>(batches), 4, 0);
    const double momentum = c_.cumulative ? 0.25 : 0.125;
    const double n = static_cast<double>(p_.per_channel());
    for (std::int64_t i = 0; i < p_.c; ++i) {
      const double std_dev = std::sqrt(oracle_var_[i]), u = compute_unit(p_.dtype);
      const double v = oracle_var_[i];
      const double error = 16 * u * std_dev + 0x1p-52 * std::fabs(oracle_mean_[i]);
      expect_near(c_, "mean", i, mean_[i], oracle_mean_[i], error);
      expect_near(c_, "variance", i, 1 / (invstd_[i] * invstd_[i]) - kEps, v, 64 * u * (v + kEps));
      const double unbiased = v * n / (n - 1), stored = unit(c_.parameters);
      const double m = (1 - momentum) * old_mean[i] + momentum * oracle_mean_[i];
      const double w = (1 - momentum) * old_var[i] + momentum * unbiased;
      expect_near(c_, "running_mean", i, running_mean_[i], m, error + stored * std::fabs(m));
      expect_near(c_, "running_var", i, running_var_[i], w, 64 * u * w + stored * w);
    }
    check_output(mean_, invstd_);
    if (masked()) check_mask();
    check_backward(true, {true, true, true, true});
    check_backward(true, {true, false, false, false});
    if (c_.activation != Activation::kIdentity) check_backward(true, {false, true, false, true});
  }

  double z(std::int64_t i, double mean, double invstd) const {
    const std::int64_t k = channel_of(i);
    return (x_[i] - mean) * invstd * weight_[k] + bias_[k] + (c_.residual ? r_[i] : 0);
  }
  // How far z may be off: by the rounding of each term, and of the result where it is stored first.
  double z_error(std::int64_t i, double mean, double invstd) const {
    const std::int64_t k = channel_of(i);
    const double terms = std::fabs((x_[i] - mean) * invstd * weight_[k]) + std::fabs(bias_[k]) +
                         (c_.residual ? std::fabs(r_[i]) : 0);
    const double stored =
        is_piecewise_linear(c_.activation) ? unit(p_.dtype) * std::fabs(z(i, mean, invstd)) : 0;
    return 32 * compute_unit(p_.dtype) * (terms + std::fabs(weight_[k])) + stored;
  }

  void check_output(const Tensor& mean, const Tensor& invstd) {
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const std::int64_t k = channel_of(i);
      const double wanted = activate(c_.activation, z(i, mean[k], invstd[k]), param_);
      const double error = 1.5 * z_error(i, mean[k], invstd[k]) +
                           unit(p_.dtype) * std::fabs(wanted) + smallest(p_.dtype);
      if (!expect_near(c_, "y", i, y_[i], wanted, error)) return;
    }
  }

  // Every byte of the mask: bits of elements as forward dropped them, bits beyond a row 0.
  void check_mask() {
    std::int64_t kept = 0, wanted = 0;
    for (const std::uint8_t byte : mask_) kept += __builtin_popcount(byte);
    for (std::int64_t i = 0; i < p_.numel(); ++i)
      wanted += was_dropped(c_.activation, y_[i]) ? 0 : 1;
    // Bytes that no element owns (planes whose rows have no padding) keep what they had.
    const std::int64_t used =
        expanded_channels(p_) > 0 ? p_.numel() / 8 : mask_rows(p_) * mask_row_bytes(p_);
    kept -= 8 * (static_cast<std::int64_t>(mask_.size()) - used);
    expect_near(c_, "bits of the mask", 0, static_cast<double>(kept), static_cast<double>(wanted),
                0);
  }

  struct Needs {
    bool dx, dresidual, dweight, dbias;
  };

  void check_backward(bool training, const Needs& needs) {
    const Tensor dweight(c_.parameters, p_.c), dbias(c_.parameters, p_.c);
    const bool mask = masked() && training;
    const Backward call{
        p_,
        dy_.data(),
        x_.data(),
        c_.residual && !mask && c_.activation != Activation::kIdentity ? r_.data() : nullptr,
        mask ? mask_.data() : nullptr,
        values(weight_),
        values(bias_),
        static_cast<const double*>(mean_.data()),
        static_cast<const double*>(invstd_.data()),
        training,
        c_.activation,
        param_,
        needs.dx ? dx_.data() : nullptr,
        needs.dresidual ? dr_.data() : nullptr,
        needs.dweight ? values(dweight) : ChannelValues{},
        needs.dbias ? values(dbias) : ChannelValues{}};
    const CudaPlan plan = plan_of(call);
    std::vector<char> workspace = workspace_of(plan);
    if (!succeeded(c_, "backward", cuda::backward(call, plan, workspace.data(), nullptr))) return;
    compare_gradients(training, needs, dweight, dbias);
  }

  double dz(std::int64_t i) const {
    if (is_piecewise_linear(c_.activation)) {
      const double slope = c_.activation == Activation::kLeakyRelu ? param_ : 0;
      return was_dropped(c_.activation, y_[i]) ? slope * dy_[i] : dy_[i];
    }
    if (c_.activation == Activation::kIdentity) return dy_[i];
    const std::int64_t k = channel_of(i);
    return dy_[i] * smooth_derivative(c_.activation, z(i, mean_[k], invstd_[k]), param_);
  }

  void compare_gradients(bool training, const Needs& needs, const Tensor& dweight,
                         const Tensor& dbias) {
    const std::size_t channels = static_cast<std::size_t>(p_.c);
    const double n = static_cast<double>(p_.per_channel()), u = compute_unit(p_.dtype);
    std::vector<double> sum(channels), dot(channels), sum_of(channels), dot_of(channels);
    std::vector<double> kinks(channels);
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const std::int64_t k = channel_of(i);
      const double g = dz(i), h = (x_[i] - mean_[k]) * invstd_[k];
      sum[k] += g, dot[k] += g * h;
      // The derivative's own error is one of about 1, not of its value far from 0.
      const double size = std::fabs(g) + 1e-3 * std::fabs(dy_[i]);
      sum_of[k] += size, dot_of[k] += size * std::fabs(h);
      if (is_kink(c_.activation, z(i, mean_[k], invstd_[k])))
        kinks[k] += 2 * std::fabs(dy_[i]) * (1 + std::fabs(h));
    }
    // A derivative in float is off by a few units; so are its sums, in the mean of their terms.
    const double each = 64 * u;
    for (std::int64_t k = 0; k < p_.c; ++k) {
      const double stored = unit(c_.parameters);
      if (needs.dbias)
        expect_near(c_, "dbias", k, dbias[k], sum[k],
                    each * sum_of[k] + stored * std::fabs(sum[k]) + kinks[k]);
      if (needs.dweight)
        expect_near(c_, "dweight", k, dweight[k], dot[k],
                    each * (dot_of[k] + sum_of[k]) + stored * std::fabs(dot[k]) + kinks[k]);
    }
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const std::int64_t k = channel_of(i);
      if (is_kink(c_.activation, z(i, mean_[k], invstd_[k]))) continue;
      const double g = dz(i), h = (x_[i] - mean_[k]) * invstd_[k];
      const double scale = invstd_[k] * weight_[k];
      const double inner = training ? g - sum[k] / n - h * dot[k] / n : g;
      const double spread =
          std::fabs(g) + sum_of[k] / n + std::fabs(h) * dot_of[k] / n + kinks[k] / n;
      const double error = std::fabs(scale) *
                           (each * spread * (1 + std::fabs(h)) + kinks[k] / n * (1 + std::fabs(h)));
      if (needs.dx &&
          !expect_near(c_, "dx", i, dx_[i], scale * inner,
                       error + unit(p_.dtype) * std::fabs(scale * inner) + smallest(p_.dtype)))
        return;
      if (needs.dresidual && !expect_near(c_, "dresidual", i, dr_[i], g,
                                          each * std::fabs(dy_[i]) + unit(p_.dtype) * std::fabs(g) +
                                              smallest(p_.dtype)))
        return;
    }
  }

  void check_inference() {
    const ForwardEval call{p_,
                           x_.data(),
                           c_.residual ? r_.data() : nullptr,
                           y_.data(),
                           values(weight_),
                           values(bias_),
                           values(running_mean_),
                           values(running_var_),
                           kEps,
                           c_.activation,
                           param_};
    if (!succeeded(c_, "forward_eval", cuda::forward_eval(call, plan_of(call), nullptr))) return;
    const cudaError_t error = cuda::eval_statistics(values(running_mean_), values(running_var_),
                                                    kEps, p_.c, static_cast<double*>(mean_.data()),
                                                    static_cast<double*>(invstd_.data()), nullptr);
    if (!succeeded(c_, "eval_statistics", error)) return;
    check_output(mean_, invstd_);
    check_backward(false, {true, true, true, true});
    check_backward(false, {true, false, false, false});
  }

  static constexpr double kEps = 1e-5;
  const Case& c_;
  const Problem& p_;
  const double param_;
  Tensor x_, r_, y_, dy_, dx_, dr_, weight_, bias_, running_mean_, running_var_, dweight_, dbias_,
      mean_, invstd_;
  std::vector<std::uint8_t> mask_;
  std::vector<double> oracle_mean_, oracle_var_;
};

// ---- which cases --------------------------------------------------------------------------------

struct Size {
  std::int64_t n, c, s;
};

// What a plan leaves to chance is forced: each strategy with few and many slots, teams and waves.
std::vector<CudaPlanOverride> plans() {
  const int block = static_cast<int>(Strategy::kBlock),
            cluster = static_cast<int>(Strategy::kCluster),
            grid = static_cast<int>(Strategy::kGrid), two = static_cast<int>(Strategy::kTwoKernels);
  const int scalar = static_cast<int>(Access::kScalar);
  return {{},
          {block, -1, -1, 0, -1, -1},
          {block, scalar, -1, 1, 8, 2},
          {cluster, -1, 2, -1, -1, -1},
          {cluster, -1, 4, 1, 16, 1},
          {grid, -1, 3, -1, -1, 2},
          {grid, scalar, 12, 0, 8, 1},
          {grid, -1, 6, -1, 136, 1},  // large enough to be shared out
          {two, -1, 2, -1, -1, -1},
          {two, -1, 9, -1, 8, 2}};
}

std::vector<Case> all_cases() {
  const std::vector<Size> first = {{2, 3, 16},   {3, 4, 49}, {5, 2, 520}, {17, 8, 4},
                                   {1, 3, 2055}, {33, 5, 8}, {9, 16, 2},  {40, 24, 9}};
  const std::vector<Size> last = {{7, 8, 1},    {40, 3, 1},  {5, 24, 9}, {3, 65, 5},
                                  {300, 16, 1}, {2, 136, 3}, {11, 17, 2}};
  std::vector<Case> cases;
  unsigned turn = 0;  // varies what needs no full cross product
  for (const DType dtype : {DType::kFloat, DType::kBFloat16, DType::kHalf, DType::kDouble}) {
    for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      const auto& sizes = layout == Layout::kChannelsFirst ? first : last;
      for (int a = 0; a < kActivations; ++a) {
        for (const CudaPlanOverride& forced : plans()) {
          ++turn;
          const Size& size = sizes[turn * 5 / 3 % sizes.size()];
          const auto parameters = static_cast<DType>(turn / 2 % 3 == 0 ? 2 : turn % 2);
          cases.push_back({{layout, dtype, size.n, size.c, size.s},
                           static_cast<Activation>(a),
                           turn % 2 == 0,
                           turn % 5 == 0 ? 1 : 0,
                           turn % 7 == 0 ? 100.0 : 0.0,
                           turn % 11 == 0,
                           parameters,
                           forced,
                           turn % 13 == 0   ? "turing"
                           : turn % 17 == 0 ? "ampere"
                                            : "hopper"});
        }
      }
    }
  }
  return cases;
}

emulation::Device device_named(const std::string& name) {
  emulation::Device device = name == "turing"   ? emulation::Device::turing()
                             : name == "ampere" ? emulation::Device::ampere()
                                                : emulation::Device{};
  device.multiprocessors = 3;  // a grid of all of it is still small
  return device;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "0/1";
  const std::size_t slash = part.find('/');
  const std::size_t k = std::stoul(part), n = std::stoul(part.substr(slash + 1));
  const unsigned long long seed = argc > 2 ? std::stoull(argv[2]) : 1;
  const std::vector<Case> cases = all_cases();
  for (std::size_t i = k; i < cases.size(); i += n) {
    std::mt19937_64 random(seed + i);
    emulation::set_seed(seed + i);
    emulation::set_device(device_named(cases[i].device));
    try {
      Run(cases[i], random).check();
    } catch (const emulation::Failure& failure) {
      ++failures;
      std::printf("%s: %s\n", cases[i].name().c_str(), failure.what());
    }
  }
  std::printf("%lld checks, %lld failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
