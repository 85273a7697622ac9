// The Python module: makes the operators loadable, tells how it was built, shows and forces plans.
//
// Nothing here is called while a network runs, and pybind11's templates take twice as long to
// optimise as to compile.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O0")
#endif

#include "bindings/module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/build.h"
#include "bindings/cuda_plans.h"
#include "bindings/planning.h"
#include "bindings/pool.h"
#include "cpu/batchnorm.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace batchnorm {
namespace bindings {
namespace {

using cpu::Capability;

constexpr const char* kSchemeNames[] = {"columns", "planes", "expanded"};
constexpr const char* kLevelNames[] = {"none", "L2", "L3", "memory"};

py::dict build_info() {
  std::vector<std::string> built;
  for (int i = 0; i < cpu::kCapabilities; ++i) {
    if (cpu::is_built(static_cast<Capability>(i))) built.push_back(cpu::kCapabilityNames[i]);
  }
  py::dict info;
  info["version"] = BATCHNORM_EXT_VERSION;
  info["torch_version"] = BATCHNORM_EXT_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpp_standard"] = static_cast<int>(__cplusplus / 100 % 100);
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  if (kHasCuda) {
    info["cuda"] =
        py::dict(py::arg("version") = kCudaVersion, py::arg("architectures") = kCudaArchitectures);
  } else {
    info["cuda"] = false;
  }
  info["cpu_capabilities_built"] = built;
  return info;
}

std::string cpu_capability() { return cpu::kCapabilityNames[static_cast<int>(cpu::capability())]; }

void set_cpu_capability(const std::string& name) {
  const int index = index_of(name, cpu::kCapabilityNames, "the CPU capability");
  if (!cpu::set_capability(static_cast<Capability>(index))) {
    throw std::runtime_error("this processor doesn't offer '" + name + "'");
  }
}

py::dict plan(const std::string& layout, const std::string& dtype, std::int64_t n, std::int64_t c,
              std::int64_t s, int threads, const std::string& op, bool masked, bool residual,
              int outputs) {
  if (threads < 1) throw py::value_error("threads should be at least 1");
  const Problem problem = problem_from(layout, dtype, n, c, s);
  const Pass pass = pass_from(op);
  const CacheSizes& caches = cpu::cache_sizes();
  const CpuPlan plan = plan_cpu(problem, pass, masked, threads, caches, plan_override());
  const Traffic traffic = predict_traffic(problem, pass, {residual, masked, outputs}, plan, caches);
  py::dict result;
  result["scheme"] = kSchemeNames[static_cast<int>(plan.scheme)];
  result["cooperative"] = plan.cooperative;
  result["stream"] = plan.stream;
  result["threads"] = plan.threads;
  result["unit_channels"] = plan.unit_channels;
  result["fold"] = plan.fold;
  result["group_rows"] = plan.group_rows;
  result["second_reading"] = kLevelNames[static_cast<int>(traffic.second_reading)];
  result["compulsory_bytes"] = traffic.compulsory;
  result["predicted_bytes"] = traffic.predicted;
  return result;
}

void force_plan(const std::optional<std::string>& scheme, std::optional<bool> cooperative,
                std::optional<bool> stream, std::optional<int> threads,
                std::optional<std::int64_t> unit_channels, std::optional<std::int64_t> fold,
                std::optional<int> group_rows) {
  PlanOverride forced;
  if (scheme) forced.scheme = index_of(*scheme, kSchemeNames, "scheme");
  if (cooperative) forced.cooperative = *cooperative;
  if (stream) forced.stream = *stream;
  if (threads) forced.threads = *threads;
  if (unit_channels) forced.unit_channels = *unit_channels;
  if (fold) forced.fold = *fold;
  if (group_rows) forced.group_rows = *group_rows;
  plan_override() = forced;
}

py::dict pool_statistics() {
  const cpu::PoolStatistics found = output_pool().statistics();
  py::dict result;
  result["in_use"] = found.in_use;
  result["kept"] = found.kept;
  result["allocations"] = found.allocations;
  result["reused"] = found.reused;
  return result;
}

void set_pool_limit(std::optional<std::int64_t> limit) {
  if (limit && *limit < 0) throw py::value_error("limit should be at least 0, or None");
  output_pool().set_limit(limit.value_or(cpu::Pool::kNoLimit));
}

}  // namespace
}  // namespace bindings
}  // namespace batchnorm

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace batchnorm::bindings;
  m.doc() = "batchnorm_ext's compiled part; importing it registers torch.ops.batchnorm_ext";
  m.def("build_info", &build_info, "How this library was built.");
  m.def("cpu_capability", &cpu_capability, "The instruction set that CPU kernels use.");
  m.def("set_cpu_capability", &set_cpu_capability, py::arg("name"),
        "Use another one; RuntimeError where the processor lacks it.");
  m.def("plan", &plan, py::arg("layout"), py::arg("dtype"), py::arg("n"), py::arg("c"),
        py::arg("s"), py::arg("threads"), py::arg("op"), py::arg("masked") = false,
        py::arg("residual") = false, py::arg("outputs") = 1,
        "How a CPU call would be cut into work (core/plan.h).");
  m.def("force_plan", &force_plan, py::kw_only(), py::arg("scheme") = py::none(),
        py::arg("cooperative") = py::none(), py::arg("stream") = py::none(),
        py::arg("threads") = py::none(), py::arg("unit_channels") = py::none(),
        py::arg("fold") = py::none(), py::arg("group_rows") = py::none(),
        "Prescribe fields of all plans from now on; without arguments, none.");
  m.def("pool_statistics", &pool_statistics, "Of the memory that large CPU outputs come from.");
  m.def("set_pool_limit", &set_pool_limit, py::arg("limit"),
        "Bytes to keep of what was freed; None: what was in use at once.");
  m.def("empty_pool", [] { output_pool().empty(); }, "Give back what is kept.");
  define_cuda_plans(m);
}
