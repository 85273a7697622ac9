// A case's data, and the calls of csrc/cuda/batchnorm.h with it. Each call writes into memory of
// its own, so that what it leaves out is seen.
#pragma once

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cuda/run.h"
#include "report.h"

namespace check {

constexpr double kEps = 1e-5;
constexpr double kMomentum = 0.125;
constexpr std::int64_t kBatchesBefore = 3;

inline double parameter_of(Activation activation) {
  return activation == Activation::kElu ? 1.5 : 0.25;
}

inline Tensor elements(const Case& c) {
  return Tensor(c.problem.dtype, c.problem.numel(), c.shift);
}
inline Tensor channel_values(const Case& c) {
  return Tensor(c.parameters, c.problem.c, 0, c.stride);
}
inline Tensor saved_values(const Case& c) { return Tensor(DType::kDouble, c.problem.c); }

struct Data {
  Tensor x, residual, dy, weight, bias, running_mean, running_var;

  Data(const Case& c, std::mt19937_64& random)
      : x(elements(c)),
        residual(elements(c)),
        dy(elements(c)),
        weight(channel_values(c)),
        bias(channel_values(c)),
        running_mean(channel_values(c)),
        running_var(channel_values(c)) {
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < c.problem.numel(); ++i) {
      const double spread = 0.5 + static_cast<double>(c.channel_of(i) % 3);
      x.put(i, spread * (normal(random) + c.mean));
      residual.put(i, normal(random));
      dy.put(i, normal(random) + 0.25);
    }
    for (std::int64_t k = 0; k < c.problem.c; ++k) {
      weight.put(k, 1 + 0.5 * normal(random));
      bias.put(k, normal(random));
      running_mean.put(k, normal(random));
      running_var.put(k, 0.5 + std::fabs(normal(random)));
    }
  }
};

struct Training {
  Tensor y, mean, invstd, running_mean, running_var;
  Buffer mask;
  Counter batches;

  explicit Training(const Case& c)
      : y(elements(c)),
        mean(saved_values(c)),
        invstd(saved_values(c)),
        running_mean(channel_values(c)),
        running_var(channel_values(c)),
        mask(mask_rows(c.problem) * mask_row_bytes(c.problem)),
        batches(kBatchesBefore) {}

  bool is_intact() const {
    return y.is_intact() && mean.is_intact() && invstd.is_intact() && running_mean.is_intact() &&
           running_var.is_intact() && mask.guards_are_intact() && batches.is_intact();
  }
  bool is_same_as(const Training& other) const {
    return y.buffer().is_same_as(other.y.buffer()) &&
           mean.buffer().is_same_as(other.mean.buffer()) &&
           invstd.buffer().is_same_as(other.invstd.buffer()) &&
           running_mean.buffer().is_same_as(other.running_mean.buffer()) &&
           running_var.buffer().is_same_as(other.running_var.buffer()) &&
           mask.is_same_as(other.mask) && batches.value() == other.batches.value();
  }
  bool kept(const Case& c, std::int64_t i) const {
    const std::int64_t bit = c.mask_bit(i);
    return (mask.host()[bit / 8] >> bit % 8 & 1) != 0;
  }
};

struct Gradients {
  Tensor dx, dresidual, dweight, dbias;

  explicit Gradients(const Case& c)
      : dx(elements(c)),
        dresidual(elements(c)),
        dweight(channel_values(c)),
        dbias(channel_values(c)) {}

  bool is_intact() const {
    return dx.is_intact() && dresidual.is_intact() && dweight.is_intact() && dbias.is_intact();
  }
  bool is_same_as(const Gradients& other) const {
    return dx.buffer().is_same_as(other.dx.buffer()) &&
           dresidual.buffer().is_same_as(other.dresidual.buffer()) &&
           dweight.buffer().is_same_as(other.dweight.buffer()) &&
           dbias.buffer().is_same_as(other.dbias.buffer());
  }
};

// Which gradients are asked for.
struct Needs {
  bool dx = true, dresidual = true, dweight = true, dbias = true;
};

// Plans the call and makes it, with exactly the workspaces that plans ask for: of one that was
// refused, and of the next.
template <typename Call>
void make(const Case& c, const char* what, const Call& call) {
  struct Workspace {
    void* address;
    void* data() const { return address; }
  };
  std::vector<std::unique_ptr<Buffer>> buffers;
  const auto allocate = [&](std::int64_t bytes) {
    buffers.push_back(std::make_unique<Buffer>(bytes));
    buffers.back()->send();
    return Workspace{buffers.back()->device()};
  };
  expect_success(
      c, what, check::call([&] { return cuda::run(opened(), call, c.forced, nullptr, allocate); }));
  for (const auto& buffer : buffers) {
    expect(c, buffer->guards_are_intact(), "the workspace is as large as planned");
  }
}

inline ForwardTrain training_call(const Case& c, const Data& data, Training* to) {
  ForwardTrain call = {};
  call.problem = c.problem;
  call.x = data.x.device();
  call.residual = c.residual ? data.residual.device() : nullptr;
  call.y = to->y.device();
  call.mask = c.masked() ? to->mask.device() : nullptr;
  if (!c.bare) {
    call.weight = data.weight.values();
    call.bias = data.bias.values();
    call.running.mean = to->running_mean.values();
    call.running.var = to->running_var.values();
    call.running.num_batches_tracked = to->batches.device();
  }
  call.running.momentum = kMomentum;
  call.running.cumulative_average = c.cumulative;
  call.eps = kEps;
  call.activation = c.activation;
  call.activation_param = parameter_of(c.activation);
  call.mean = to->mean.device_doubles();
  call.invstd = to->invstd.device_doubles();
  return call;
}

inline Training train(const Case& c, const Data& data, bool skip_nonfinite = false) {
  Training to(c);
  to.running_mean.copy_from(data.running_mean);
  to.running_var.copy_from(data.running_var);
  ForwardTrain call = training_call(c, data, &to);
  call.running.skip_nonfinite = skip_nonfinite;
  make(c, "forward_train", call);
  expect(c, to.is_intact(), "forward_train writes its outputs and nothing else");
  return to;
}

// y and the mask; the statistics are eval_statistics' affair.
inline Training infer(const Case& c, const Data& data) {
  Training to(c);
  const ForwardEval call{c.problem,
                         data.x.device(),
                         c.residual ? data.residual.device() : nullptr,
                         to.y.device(),
                         c.bare ? ChannelValues{} : data.weight.values(),
                         c.bare ? ChannelValues{} : data.bias.values(),
                         data.running_mean.values(),
                         data.running_var.values(),
                         kEps,
                         c.activation,
                         parameter_of(c.activation),
                         c.masked() ? to.mask.device() : nullptr};
  make(c, "forward_eval", call);
  expect(c, to.is_intact(), "forward_eval writes its outputs and nothing else");
  return to;
}

// `mask`, as forward wrote it, or null. Without one, z is computed again where it is needed.
inline Backward gradient_call(const Case& c, const Data& data, const Tensor& mean,
                              const Tensor& invstd, const Buffer* mask, bool training,
                              const Needs& needs, Gradients* to) {
  const bool recomputes = c.residual && !mask && c.activation != Activation::kIdentity;
  return {c.problem,
          data.dy.device(),
          data.x.device(),
          recomputes ? data.residual.device() : nullptr,
          mask ? mask->device() : nullptr,
          c.bare ? ChannelValues{} : data.weight.values(),
          c.bare ? ChannelValues{} : data.bias.values(),
          mean.device_doubles(),
          invstd.device_doubles(),
          training,
          c.activation,
          parameter_of(c.activation),
          needs.dx ? to->dx.device() : nullptr,
          needs.dresidual ? to->dresidual.device() : nullptr,
          needs.dweight ? to->dweight.values() : ChannelValues{},
          needs.dbias ? to->dbias.values() : ChannelValues{}};
}

inline Gradients differentiate(const Case& c, const Data& data, const Tensor& mean,
                               const Tensor& invstd, const Buffer* mask, bool training,
                               const Needs& needs) {
  Gradients to(c);
  const Backward call = gradient_call(c, data, mean, invstd, mask, training, needs, &to);
  make(c, "backward", call);
  expect(c, to.is_intact(), "backward writes its outputs and nothing else");
  return to;
}

inline Gradients differentiate(const Case& c, const Data& data, const Training& forward,
                               const Needs& needs = {}) {
  return differentiate(c, data, forward.mean, forward.invstd, c.masked() ? &forward.mask : nullptr,
                       true, needs);
}

}  // namespace check
