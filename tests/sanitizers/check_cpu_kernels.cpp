// Runs the CPU kernels against naive loops in double precision, under a sanitizer.
//
//   check_cpu_kernels CASES [SEED [threaded|any [none|overrun|race|value [INSTRUCTION SET ...]]]]
//
// Cases are drawn pseudo-randomly: dtype, layout, shape, activation, residual, mask, instruction
// set (of those that are named, or all) and plan. "threaded" draws only those that several threads
// share, and no guard pages. The fourth argument plants a mistake, which the run must then report.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/plan.h"
#include "cpu/batchnorm.h"
#include "cpu/kernels.h"

namespace {

using batchnorm::Activation;
using batchnorm::CacheSizes;
using batchnorm::ChannelValues;
using batchnorm::CpuPlan;
using batchnorm::DType;
using batchnorm::Layout;
using batchnorm::Pass;
using batchnorm::PlanOverride;
using batchnorm::Problem;
using batchnorm::cpu::Capability;

enum class Plant { kNothing, kOverrun, kRace, kValue };

// splitmix64: the same cases everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int bound) { return static_cast<int>(bits() % static_cast<std::uint64_t>(bound)); }
  bool one_in(int chances) { return below(chances) == 0; }
  // In [-1, 1).
  double value() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1; }
  template <typename T, std::size_t kCount>
  T pick(const T (&from)[kCount]) {
    return from[below(static_cast<int>(kCount))];
  }

 private:
  std::uint64_t state_;
};

// ---- dtypes ----

constexpr const char* kDTypeNames[] = {"float32", "float64", "bfloat16", "float16"};

// Half the distance of neighbouring values, relative to them.
double unit_roundoff(DType dtype) {
  constexpr double kOf[] = {0x1p-24, 0x1p-53, 0x1p-8, 0x1p-11};
  return kOf[static_cast<int>(dtype)];
}
// What the kernels' arithmetic may lose, relative to the largest term: some tens of roundings.
double arithmetic_error(DType dtype) { return dtype == DType::kDouble ? 1e-12 : 1e-5; }

double half_to_double(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double value =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return bits & 0x8000 ? -value : value;
}

double get(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::kFloat) return static_cast<const float*>(data)[i];
  if (dtype == DType::kDouble) return static_cast<const double*>(data)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[i];
  if (dtype == DType::kHalf) return half_to_double(bits);
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// For inputs, so that truncation will do for the 16-bit types; |value| in [2^-14, 60000] or 0.
void put(void* data, DType dtype, std::int64_t i, double value) {
  if (dtype == DType::kFloat) {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  } else if (dtype == DType::kDouble) {
    static_cast<double*>(data)[i] = value;
  } else {
    const float single = std::fabs(value) < 0x1p-14 ? 0 : static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &single, sizeof(bits));
    if (dtype == DType::kHalf && single != 0) {
      const std::uint32_t magnitude = (bits & 0x7fffffffu) - (112u << 23);
      bits = (bits & 0x80000000u) | (magnitude << 3);
    }
    static_cast<std::uint16_t*>(data)[i] = static_cast<std::uint16_t>(bits >> 16);
  }
}

// ---- memory ----

// A sanitizer doesn't see accesses by intrinsics (masked loads, streaming stores). The guard pages
// do, at one end.
enum class Placement { kHeap, kMisaligned, kGuardBehind, kGuardBefore };

class Buffer {
 public:
  Buffer() = default;
  // Exactly count elements, every byte 0xff: nan in all dtypes.
  Buffer(DType dtype, std::int64_t count, Placement placement) : dtype_(dtype), count_(count) {
    const std::size_t element = static_cast<std::size_t>(batchnorm::size_of(dtype));
    allocate(static_cast<std::size_t>(count) * element, element, placement);
  }
  static Buffer of_bytes(std::int64_t count, Placement placement) {
    Buffer buffer;
    buffer.count_ = count;
    buffer.allocate(static_cast<std::size_t>(count), 1, placement);
    return buffer;
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(dtype_, other.dtype_);
    std::swap(count_, other.count_);
    std::swap(data_, other.data_);
    std::swap(block_, other.block_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Buffer() {
    if (mapped_ > 0) {
      munmap(block_, mapped_);
    } else {
      std::free(block_);
    }
  }

  explicit operator bool() const { return data_ != nullptr; }
  void* data() const { return data_; }
  std::uint8_t* bytes() const { return static_cast<std::uint8_t*>(data_); }
  double* doubles() const { return static_cast<double*>(data_); }
  DType dtype() const { return dtype_; }
  std::int64_t count() const { return count_; }
  double operator[](std::int64_t i) const { return get(data_, dtype_, i); }
  void set(std::int64_t i, double value) { put(data_, dtype_, i, value); }

 private:
  void allocate(std::size_t bytes, std::size_t element, Placement placement) {
    std::size_t offset = placement == Placement::kMisaligned ? element : 0;
    if (placement == Placement::kHeap || placement == Placement::kMisaligned) {
      block_ = std::malloc(bytes + offset);
    } else {
      const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
      const std::size_t rounded = (bytes + page - 1) / page * page;
      mapped_ = rounded + 2 * page;
      block_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (block_ == MAP_FAILED) std::abort();
      mprotect(block_, page, PROT_NONE);
      mprotect(static_cast<char*>(block_) + page + rounded, page, PROT_NONE);
      offset = page + (placement == Placement::kGuardBehind ? rounded - bytes : 0);
    }
    if (!block_) std::abort();
    data_ = static_cast<char*>(block_) + offset;
    std::memset(data_, 0xff, bytes);
  }

  DType dtype_ = DType::kFloat;
  std::int64_t count_ = 0;
  void* data_ = nullptr;
  void* block_ = nullptr;
  std::size_t mapped_ = 0;
};

// ---- activations ----

double value_of(Activation activation, double z, double param) {
  switch (activation) {
    case Activation::kRelu:
      return std::max(z, 0.0);
    case Activation::kRelu6:
      return std::min(std::max(z, 0.0), 6.0);
    case Activation::kLeakyRelu:
      return z > 0 ? z : param * z;
    case Activation::kElu:
      return z > 0 ? z : param * std::expm1(z);
    case Activation::kSilu:
      return z / (1 + std::exp(-z));
    case Activation::kGelu:
      return z * 0.5 * std::erfc(-z * std::sqrt(0.5));
    case Activation::kGeluTanh:
      return z * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::kHardswish:
      return z * std::min(std::max(z + 3, 0.0), 6.0) / 6;
    default:
      return z;
  }
}

double derivative_of(Activation activation, double z, double param) {
  switch (activation) {
    case Activation::kRelu:
      return z > 0;
    case Activation::kRelu6:
      return z > 0 && z < 6;
    case Activation::kLeakyRelu:
      return z > 0 ? 1 : param;
    case Activation::kElu:
      return z > 0 ? 1 : param * std::exp(z);
    case Activation::kSilu: {
      const double s = 1 / (1 + std::exp(-z));
      return s + z * s * (1 - s);
    }
    case Activation::kGelu:
      return 0.5 * std::erfc(-z * std::sqrt(0.5)) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
    case Activation::kGeluTanh: {
      const double root = std::sqrt(2 / M_PI);
      const double t = std::tanh(root * (z + 0.044715 * z * z * z));
      return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * root * (1 + 3 * 0.044715 * z * z);
    }
    case Activation::kHardswish:
      return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5;
    default:
      return 1;
  }
}

// Whether the derivative jumps so near to z that rounding may decide.
bool near_jump(Activation activation, double z, double error) {
  const auto at = [&](double jump) { return std::fabs(z - jump) <= error; };
  switch (activation) {
    case Activation::kRelu:
    case Activation::kLeakyRelu:
    case Activation::kElu:
      return at(0);
    case Activation::kRelu6:
      return at(0) || at(6);
    case Activation::kHardswish:
      return at(-3) || at(3);
    default:
      return false;
  }
}

// ---- a case ----

struct Case {
  Problem problem;
  Activation activation;
  double param;
  bool residual, mask, training;
  Capability capability;
  PlanOverride forced;
  CacheSizes caches;
  Placement placement;
  int workers;  // threads of the parallel loop
  std::uint64_t seed;
};

constexpr const char* kPlacementNames[] = {"heap", "misaligned", "guard behind", "guard before"};

const char* name_of(Capability capability) {
  return batchnorm::cpu::kCapabilityNames[static_cast<int>(capability)];
}

std::string describe(const Case& c) {
  char text[512];
  const Problem& p = c.problem;
  const PlanOverride& f = c.forced;
  std::snprintf(
      text, sizeof(text),
      "%s %s n=%lld c=%lld s=%lld %s(%g)%s%s training=%d on %s; forced scheme=%d cooperative=%d "
      "stream=%d threads=%d unit_channels=%lld fold=%lld; l2=%lld l3=%lld; %s; seed %llu",
      kDTypeNames[static_cast<int>(p.dtype)],
      p.layout == Layout::kChannelsFirst ? "channels_first" : "channels_last",
      static_cast<long long>(p.n), static_cast<long long>(p.c), static_cast<long long>(p.s),
      batchnorm::kActivationNames[static_cast<int>(c.activation)], c.param,
      c.residual ? " residual" : "", c.mask ? " mask" : "", c.training, name_of(c.capability),
      f.scheme, f.cooperative, f.stream, f.threads, static_cast<long long>(f.unit_channels),
      static_cast<long long>(f.fold), static_cast<long long>(c.caches.l2),
      static_cast<long long>(c.caches.l3), kPlacementNames[static_cast<int>(c.placement)],
      static_cast<unsigned long long>(c.seed));
  return text;
}

// What the processor has, of these names if there are any.
std::vector<Capability> available(const std::vector<std::string>& names) {
  std::vector<Capability> found;
  for (int i = 0; i < batchnorm::cpu::kCapabilities; ++i) {
    const auto each = static_cast<Capability>(i);
    const bool named = std::find(names.begin(), names.end(), name_of(each)) != names.end();
    if (batchnorm::cpu::is_available(each) && (named || names.empty())) found.push_back(each);
  }
  return found;
}

Case draw(std::uint64_t seed, bool threaded, const std::vector<Capability>& capabilities) {
  constexpr int kN[] = {1, 2, 9, 33}, kC[] = {1, 3, 8, 17, 65}, kS[] = {1, 2, 7, 49, 64, 65, 130};
  constexpr int kUnits[] = {1, 2, 3, 5, 8, 16, 20, 64}, kFolds[] = {1, 2, 3, 4, 7, 16};
  Random random(seed);
  Case c{};
  c.seed = seed;
  Problem& p = c.problem;
  const std::int64_t most = random.one_in(50) ? 300000 : 12000;
  do {
    p = {static_cast<Layout>(random.below(2)), static_cast<DType>(random.below(4)), random.pick(kN),
         random.pick(kC), random.pick(kS)};
  } while (p.numel() > most);
  c.activation = static_cast<Activation>(random.below(batchnorm::kActivations));
  c.param = 0.25 + 0.5 * random.below(3);
  c.residual = random.one_in(2);
  c.mask = random.one_in(2) && batchnorm::is_piecewise_linear(c.activation);
  c.training = !random.one_in(4);
  c.capability =
      capabilities[static_cast<std::size_t>(random.below(static_cast<int>(capabilities.size())))];
  c.workers = threaded ? 3 : 1 + random.below(3);
  PlanOverride& f = c.forced;
  f.threads = threaded ? 2 + random.below(2) : 1 + random.below(3);
  if (!random.one_in(3)) f.scheme = 1 + random.below(2);
  if (!random.one_in(3)) f.cooperative = random.below(2);
  if (!random.one_in(3)) f.stream = random.below(2);
  if (!random.one_in(3)) f.unit_channels = random.pick(kUnits);
  if (!random.one_in(3)) f.fold = random.pick(kFolds);
  // Small caches make the planner cut problems as small as these.
  c.caches = random.one_in(2) ? CacheSizes{1 << 20, 16 << 20}
                              : CacheSizes{1 << (8 + random.below(8)), 1 << (10 + random.below(8))};
  c.placement = static_cast<Placement>(random.below(threaded ? 2 : 4));
  return c;
}

struct Location {
  std::int64_t channel, mask_byte;
  int mask_bit;
};

// Of element i in memory's order.
Location locate(const Problem& p, const CpuPlan& plan, std::int64_t i) {
  if (plan.fold > 1) return {i % p.c, i / 8, static_cast<int>(i % 8)};
  if (plan.scheme == batchnorm::Scheme::kExpanded) {
    const std::int64_t image = p.c * p.s, at = i % image;
    const std::int64_t row_bytes = p.c * batchnorm::mask_row_bytes(p);
    return {at / p.s, i / image * row_bytes + at / 8, static_cast<int>(at % 8)};
  }
  const bool first = p.layout == Layout::kChannelsFirst;
  const std::int64_t length = first ? p.s : p.c, row = i / length, at = i % length;
  return {first ? row % p.c : at, row * batchnorm::mask_row_bytes(p) + at / 8,
          static_cast<int>(at % 8)};
}

class Check {
 public:
  Check(const Case& c, Plant plant)
      : c_(c), p_(c.problem), plant_(plant), random_(c.seed ^ 0x5bd1e995u) {
    make_inputs();
  }

  void run() {
    batchnorm::cpu::set_capability(c_.capability);
    batch_statistics();
    forward_train();
    forward_eval();
    backward();
  }

 private:
  // ---- inputs ----

  Buffer elements() { return Buffer(p_.dtype, p_.numel(), c_.placement); }
  Buffer output() {
    const std::int64_t missing = plant_ == Plant::kOverrun ? 1 : 0;
    return Buffer(p_.dtype, p_.numel() - missing, c_.placement);
  }

  // Values of each channel, with a stride now and then; 0xff bytes in between.
  struct PerChannel {
    Buffer buffer;
    std::int64_t stride = 1;
    ChannelValues view() const { return {buffer.data(), buffer.dtype(), stride}; }
    double operator[](std::int64_t c) const { return buffer[c * stride]; }
  };
  PerChannel per_channel() {
    PerChannel values;
    const DType dtypes[] = {p_.dtype, DType::kFloat, static_cast<DType>(random_.below(4))};
    values.stride = random_.one_in(4) ? 3 : 1;
    values.buffer = Buffer(random_.pick(dtypes), (p_.c - 1) * values.stride + 1, c_.placement);
    return values;
  }
  PerChannel per_channel(double center, double spread) {
    PerChannel values = per_channel();
    for (std::int64_t c = 0; c < p_.c; ++c) {
      values.buffer.set(c * values.stride, center + spread * random_.value());
    }
    return values;
  }

  void make_inputs() {
    x_ = elements();
    dy_ = elements();
    if (c_.residual) residual_ = elements();
    std::vector<double> centers;
    for (std::int64_t c = 0; c < p_.c; ++c) centers.push_back(3 * random_.value());
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const double center = centers[static_cast<std::size_t>(location(i).channel)];
      x_.set(i, center + 2 * random_.value());
      dy_.set(i, random_.value());
      if (residual_) residual_.set(i, 2 * random_.value());
    }
    if (!random_.one_in(4)) weight_ = per_channel(1.25, 1);
    if (!random_.one_in(4)) bias_ = per_channel(0.5, 2);
    running_mean_ = per_channel(0, 1);
    running_var_ = per_channel(1.5, 1);
  }

  double weight(std::int64_t c) const { return weight_.buffer ? weight_[c] : 1; }
  double bias(std::int64_t c) const { return bias_.buffer ? bias_[c] : 0; }

  // ---- the naive side ----

  void batch_statistics() {
    const std::size_t channels = static_cast<std::size_t>(p_.c);
    const double n = static_cast<double>(p_.per_channel());
    mean_.assign(channels, 0);
    m2_.assign(channels, 0);
    for (std::int64_t i = 0; i < p_.numel(); ++i) mean_[channel(i)] += x_[i];
    for (double& mean : mean_) mean /= n;
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const double d = x_[i] - mean_[channel(i)];
      m2_[channel(i)] += d * d;
    }
    invstd_.clear();
    for (const double m2 : m2_) invstd_.push_back(1 / std::sqrt(m2 / n + kEps));
  }

  std::size_t channel(std::int64_t i) const {
    return static_cast<std::size_t>(location(i).channel);
  }

  // The activation's input, and what rounding may change about it.
  struct Input {
    double z, error;
  };
  Input input_at(std::int64_t i, const std::vector<double>& mean,
                 const std::vector<double>& invstd) const {
    const std::size_t c = channel(i);
    const auto at = static_cast<std::int64_t>(c);
    const double scaled = (x_[i] - mean[c]) * invstd[c] * weight(at);
    const double residual = residual_ ? residual_[i] : 0;
    const double z = scaled + bias(at) + residual;
    const double size = 1 + std::fabs(scaled) + std::fabs(bias(at)) + std::fabs(residual);
    double error = arithmetic_error(p_.dtype) * size;
    if (batchnorm::is_piecewise_linear(c_.activation)) {
      error += 1.01 * unit_roundoff(p_.dtype) * std::fabs(z);
    }
    return {z, error};
  }

  // ---- comparison ----

  [[noreturn]] void fail(const char* what, std::int64_t index, double got, double expected,
                         double allowed) const {
    std::fprintf(stderr, "wrong %s[%lld]: %.17g, expected %.17g +- %.3g\ncase: %s\n", what,
                 static_cast<long long>(index), got, expected, allowed, describe(c_).c_str());
    std::exit(1);
  }

  // A stored value: allowed covers what comes before it is rounded to dtype.
  void expect(const char* what, std::int64_t index, double got, double expected, double allowed,
              DType dtype) const {
    allowed += 1.01 * unit_roundoff(dtype) * (std::fabs(expected) + allowed) + 0x1p-24;
    if (dtype == DType::kDouble) allowed -= 0x1p-24;
    if (!(std::fabs(got - expected) <= allowed)) fail(what, index, got, expected, allowed);
  }

  void expect_gaps(const char* what, const PerChannel& values) const {
    for (std::int64_t i = 0; i < values.buffer.count(); ++i) {
      const double value = values.buffer[i];
      if (i % values.stride != 0 && value == value) fail(what, i, value, NAN, 0);
    }
  }

  void expect_output(const char* what, const Buffer& y, const std::vector<double>& mean,
                     const std::vector<double>& invstd) const {
    for (std::int64_t i = 0; i < y.count(); ++i) {
      const Input in = input_at(i, mean, invstd);
      double expected = value_of(c_.activation, in.z, c_.param);
      if (plant_ == Plant::kValue && i == y.count() - 1) expected += 0.5;
      expect(what, i, y[i], expected, 2 * in.error, p_.dtype);
    }
  }

  // ---- calls ----

  CpuPlan plan(Pass pass, bool masked) const {
    return plan_cpu(p_, pass, masked, c_.forced.threads, c_.caches, c_.forced);
  }

  void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)>& body) const {
    const std::int64_t workers = std::min<std::int64_t>(c_.workers, tasks);
    const auto work = [&](std::int64_t worker) {
      for (std::int64_t i = worker; i < tasks; i += workers) body(i);
      if (plant_ == Plant::kRace && worker > 0) body(0);
    };
    std::vector<std::thread> threads;
    for (std::int64_t worker = 1; worker < workers; ++worker) threads.emplace_back(work, worker);
    work(0);
    for (std::thread& thread : threads) thread.join();
  }

  // On a fresh thread, whose scratch memory is no larger than this call needs.
  template <typename Call>
  void in_fresh_thread(const Call& call) const {
    const batchnorm::cpu::ParallelFor loop = [this](std::int64_t tasks,
                                                    const std::function<void(std::int64_t)>& body) {
      parallel_for(tasks, body);
    };
    std::thread([&] { call(loop); }).join();
  }

  const void* residual() const { return residual_.data(); }

  void forward_train() {
    const Buffer y = output();
    const Buffer mean(DType::kDouble, p_.c, c_.placement);
    const Buffer invstd(DType::kDouble, p_.c, c_.placement);
    const std::int64_t mask_bytes =
        c_.mask ? batchnorm::mask_rows(p_) * batchnorm::mask_row_bytes(p_) : 0;
    Buffer mask;
    if (c_.mask) {
      mask = Buffer::of_bytes(mask_bytes, c_.placement);
      fill_with_wrong_bits(mask, mean_, invstd_);
    }
    const bool tracked = !random_.one_in(4), cumulative = random_.one_in(4);
    PerChannel new_mean = tracked ? per_channel(0, 1) : PerChannel{};
    PerChannel new_var = tracked ? per_channel(1.5, 1) : PerChannel{};
    std::vector<double> before_mean, before_var;
    for (std::int64_t c = 0; tracked && c < p_.c; ++c) {
      before_mean.push_back(new_mean[c]);
      before_var.push_back(new_var[c]);
    }
    std::int64_t batches = 4;
    const double momentum = cumulative ? 0.2 : 0.3;
    const batchnorm::ForwardTrain call{
        p_,
        x_.data(),
        residual(),
        y.data(),
        c_.mask ? mask.bytes() : nullptr,
        weight_.view(),
        bias_.view(),
        {new_mean.view(), new_var.view(), tracked ? &batches : nullptr, 0.3, tracked && cumulative},
        kEps,
        c_.activation,
        c_.param,
        mean.doubles(),
        invstd.doubles(),
        nullptr};
    in_fresh_thread(
        [&](const auto& loop) { batchnorm::cpu::forward_train(call, forward_plan_, loop); });

    const double error = arithmetic_error(p_.dtype);
    for (std::int64_t c = 0; c < p_.c; ++c) {
      const auto i = static_cast<std::size_t>(c);
      const double n = static_cast<double>(p_.per_channel()), var = m2_[i] / n;
      const double mean_error = error * std::sqrt(var) + 1e-14;
      expect("mean", c, mean[c], mean_[i], mean_error, DType::kDouble);
      expect("invstd", c, invstd[c], invstd_[i], error * invstd_[i], DType::kDouble);
      if (!tracked) continue;
      const double m = (1 - momentum) * before_mean[i] + momentum * mean_[i];
      expect("running_mean", c, new_mean[c], m, mean_error + 1e-14, new_mean.buffer.dtype());
      // One value has no unbiased variance, and moves nothing.
      const double unbiased = n == 1 ? before_var[i] : m2_[i] / (n - 1);
      const double v = (1 - momentum) * before_var[i] + momentum * unbiased;
      expect("running_var", c, new_var[c], v, error * unbiased + 1e-14, new_var.buffer.dtype());
    }
    if (tracked && batches != 5) {
      fail("num_batches_tracked", 0, static_cast<double>(batches), 5, 0);
    }
    expect_gaps("running_mean", new_mean);
    expect_gaps("running_var", new_var);
    expect_output("y", y, mean_, invstd_);
    if (c_.mask) expect_mask(mask, mean_, invstd_);
  }

  Location location(std::int64_t i) const { return locate(p_, forward_plan_, i); }

  bool expected_bit(const Input& in) const { return derivative_of(c_.activation, in.z, 0) == 1; }

  // So that a bit that isn't written is wrong.
  void fill_with_wrong_bits(const Buffer& mask, const std::vector<double>& mean,
                            const std::vector<double>& invstd) const {
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      if (!expected_bit(input_at(i, mean, invstd))) continue;
      const Location at = location(i);
      mask.bytes()[at.mask_byte] &= static_cast<std::uint8_t>(~(1u << at.mask_bit));
    }
  }

  void expect_mask(const Buffer& mask, const std::vector<double>& mean,
                   const std::vector<double>& invstd) const {
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const Location at = location(i);
      const Input in = input_at(i, mean, invstd);
      if (near_jump(c_.activation, in.z, in.error)) continue;
      const bool bit = (mask.bytes()[at.mask_byte] >> at.mask_bit) & 1;
      if (bit != expected_bit(in)) fail("bit of the mask of element", i, bit, !bit, 0);
    }
  }

  void forward_eval() {
    std::vector<double> mean, invstd;
    for (std::int64_t c = 0; c < p_.c; ++c) {
      mean.push_back(running_mean_[c]);
      invstd.push_back(1 / std::sqrt(running_var_[c] + kEps));
    }
    const Buffer y = output();
    const Buffer mask = c_.mask ? random_mask() : Buffer{};
    if (c_.mask) fill_with_wrong_bits(mask, mean, invstd);
    const batchnorm::ForwardEval call{p_,
                                      x_.data(),
                                      residual(),
                                      y.data(),
                                      weight_.view(),
                                      bias_.view(),
                                      running_mean_.view(),
                                      running_var_.view(),
                                      kEps,
                                      c_.activation,
                                      c_.param,
                                      c_.mask ? mask.bytes() : nullptr};
    const CpuPlan chosen = plan(Pass::kEval, c_.mask);
    in_fresh_thread([&](const auto& loop) { batchnorm::cpu::forward_eval(call, chosen, loop); });
    expect_output("y in eval mode", y, mean, invstd);
    if (c_.mask) expect_mask(mask, mean, invstd);
  }

  // The mask's bits are an input like any other: random ones, beside the rows' ends too.
  Buffer random_mask() {
    Buffer mask =
        Buffer::of_bytes(batchnorm::mask_rows(p_) * batchnorm::mask_row_bytes(p_), c_.placement);
    for (std::int64_t i = 0; i < mask.count(); ++i) {
      mask.bytes()[i] = static_cast<std::uint8_t>(random_.bits());
    }
    return mask;
  }

  void backward() {
    Buffer mean(DType::kDouble, p_.c, c_.placement), invstd(DType::kDouble, p_.c, c_.placement);
    const Buffer mask = c_.mask ? random_mask() : Buffer{};
    std::vector<double> dz(static_cast<std::size_t>(p_.numel()));
    for (std::int64_t c = 0; c < p_.c; ++c) {
      mean.set(c, mean_[static_cast<std::size_t>(c)]);
      invstd.set(c, invstd_[static_cast<std::size_t>(c)]);
    }
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const Input in = input_at(i, mean_, invstd_);
      double slope;
      if (c_.mask) {
        const Location at = location(i);
        const bool keeps = (mask.bytes()[at.mask_byte] >> at.mask_bit) & 1;
        slope = keeps ? 1 : c_.activation == Activation::kLeakyRelu ? c_.param : 0;
      } else {
        if (near_jump(c_.activation, in.z, in.error)) dy_.set(i, 0);  // either derivative will do
        slope = derivative_of(c_.activation, in.z, c_.param);
      }
      dz[static_cast<std::size_t>(i)] = dy_[i] * slope;
    }

    const bool want_dx = !random_.one_in(4), want_dresidual = random_.one_in(2);
    const Buffer dx = want_dx ? output() : Buffer{};
    const Buffer dresidual = want_dresidual ? output() : Buffer{};
    const PerChannel dweight = random_.one_in(3) ? PerChannel{} : per_channel();
    const PerChannel dbias = random_.one_in(3) ? PerChannel{} : per_channel();
    const batchnorm::Backward call{p_,
                                   dy_.data(),
                                   x_.data(),
                                   c_.mask && random_.one_in(2) ? nullptr : residual(),
                                   c_.mask ? mask.bytes() : nullptr,
                                   weight_.view(),
                                   bias_.view(),
                                   mean.doubles(),
                                   invstd.doubles(),
                                   c_.training,
                                   c_.activation,
                                   c_.param,
                                   dx.data(),
                                   dresidual.data(),
                                   dweight.view(),
                                   dbias.view()};
    const CpuPlan chosen = plan(Pass::kBackward, c_.mask);
    in_fresh_thread([&](const auto& loop) { batchnorm::cpu::backward(call, chosen, loop); });
    expect_gradients(dz, dx, dresidual, dweight, dbias);
  }

  void expect_gradients(const std::vector<double>& dz, const Buffer& dx, const Buffer& dresidual,
                        const PerChannel& dweight, const PerChannel& dbias) const {
    struct Sums {
      double dz = 0, dz_size = 0, dot = 0, dot_size = 0;
    };
    std::vector<Sums> sums(static_cast<std::size_t>(p_.c));
    const auto normalized = [&](std::int64_t i) {
      return (x_[i] - mean_[channel(i)]) * invstd_[channel(i)];
    };
    // The arithmetic's error counts with the size of dy, whose product with an inexact derivative
    // dz is.
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      Sums& s = sums[channel(i)];
      const double gradient = dz[static_cast<std::size_t>(i)];
      const double size = std::fabs(gradient) + std::fabs(dy_[i]), x = normalized(i);
      s.dz += gradient;
      s.dz_size += size;
      s.dot += gradient * x;
      s.dot_size += size * std::fabs(x);
    }
    const double error = 2 * arithmetic_error(p_.dtype);
    for (std::int64_t c = 0; c < p_.c; ++c) {
      const Sums& s = sums[static_cast<std::size_t>(c)];
      if (dweight.buffer) {
        expect("dweight", c, dweight[c], s.dot, error * s.dot_size, dweight.buffer.dtype());
      }
      if (dbias.buffer) {
        expect("dbias", c, dbias[c], s.dz, error * s.dz_size, dbias.buffer.dtype());
      }
    }
    expect_gaps("dweight", dweight);
    expect_gaps("dbias", dbias);
    const double n = static_cast<double>(p_.per_channel());
    for (std::int64_t i = 0; i < p_.numel(); ++i) {
      const Sums& s = sums[channel(i)];
      const double gradient = dz[static_cast<std::size_t>(i)], x = normalized(i);
      const double own = std::fabs(gradient) + std::fabs(dy_[i]);
      if (i < dresidual.count()) {
        expect("dresidual", i, dresidual[i], gradient, error * own, p_.dtype);
      }
      if (i >= dx.count()) continue;
      const double slope = weight(static_cast<std::int64_t>(channel(i))) * invstd_[channel(i)];
      const double bracket = c_.training ? (s.dz + x * s.dot) / n : 0;
      const double size = own + (s.dz_size + std::fabs(x) * s.dot_size) / n;
      expect("dx", i, dx[i], slope * (gradient - bracket), error * std::fabs(slope) * size,
             p_.dtype);
    }
  }

  static constexpr double kEps = 1e-3;

  const Case& c_;
  const Problem& p_;
  const Plant plant_;
  const CpuPlan forward_plan_ = plan(Pass::kForward, c_.mask);
  Random random_;
  Buffer x_, dy_, residual_;
  PerChannel weight_, bias_, running_mean_, running_var_;
  std::vector<double> mean_, m2_, invstd_;
};

}  // namespace

int main(int argc, char** argv) {
  const long cases = argc > 1 ? std::atol(argv[1]) : 1000;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const bool threaded = argc > 3 && std::string(argv[3]) == "threaded";
  constexpr const char* kPlants[] = {"none", "overrun", "race", "value"};
  const std::string planted = argc > 4 ? argv[4] : "none";
  const auto* const plant = std::find(std::begin(kPlants), std::end(kPlants), planted);
  if (plant == std::end(kPlants)) {
    std::fprintf(stderr, "no such mistake: %s\n", planted.c_str());
    return 2;
  }
  const std::vector<Capability> capabilities = available({argv + std::min(argc, 5), argv + argc});
  if (capabilities.empty()) {
    std::fprintf(stderr, "this processor has none of the instruction sets\n");
    return 2;
  }
  Random seeds(seed);
  for (long i = 0; i < cases; ++i) {
    Case c = draw(seeds.bits(), threaded, capabilities);
    Check(c, static_cast<Plant>(plant - kPlants)).run();
  }
  std::printf("checked %ld cases on", cases);
  for (const Capability capability : capabilities) std::printf(" %s", name_of(capability));
  std::printf("\n");
  return 0;
}
