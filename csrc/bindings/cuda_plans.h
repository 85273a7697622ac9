// Plans of CUDA calls, for Python to see and to force. Integers only: in every build, and for
// devices that are not at hand. Included once in each Python module: what it needs of headers takes
// longer to compile than itself.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>

#include "bindings/module.h"
#include "bindings/planning.h"
#include "core/devices.h"

namespace batchnorm {
namespace bindings {

namespace py = pybind11;

constexpr const char* kMappingNames[] = {"planes", "columns"};
constexpr const char* kAccessNames[] = {"vector", "scalar"};

using Name = std::optional<std::string>;
using Count = std::optional<std::int64_t>;

inline py::dict dict_of(const DeviceLimits& limits) {
  py::dict result;
  result["compute_capability"] = limits.compute_capability;
  result["multiprocessors"] = limits.multiprocessors;
  result["threads_per_multiprocessor"] = limits.threads_per_multiprocessor;
  result["shared_per_block"] = limits.shared_per_block;
  result["shared_per_multiprocessor"] = limits.shared_per_multiprocessor;
  result["reserved_shared"] = limits.reserved_shared;
  result["l2"] = limits.l2;
  result["max_cluster"] = limits.max_cluster;
  result["cooperative"] = limits.cooperative;
  return result;
}

inline DeviceLimits limits_from(const py::dict& fields) {
  const py::dict known = dict_of({});
  for (const auto& [name, value] : fields) {
    if (!known.contains(name)) {
      throw py::value_error("a device has no field '" + std::string(py::str(name)) + "'");
    }
  }
  const auto at = [&](const char* name) {
    if (!fields.contains(name)) {
      throw py::value_error("a device needs the field '" + std::string(name) + "'");
    }
    return fields[name];
  };
  return {at("compute_capability").cast<int>(),
          at("multiprocessors").cast<int>(),
          at("threads_per_multiprocessor").cast<int>(),
          at("shared_per_block").cast<std::int64_t>(),
          at("shared_per_multiprocessor").cast<std::int64_t>(),
          at("reserved_shared").cast<std::int64_t>(),
          at("l2").cast<std::int64_t>(),
          at("max_cluster").cast<int>(),
          at("cooperative").cast<bool>()};
}

inline py::dict cuda_devices() {
  py::dict result;
  for (const NamedDevice& device : kDevices) result[device.name] = dict_of(device.limits);
  return result;
}

inline DeviceLimits device_from(const py::object& device) {
  if (!py::isinstance<py::str>(device)) return limits_from(device.cast<py::dict>());
  const auto name = device.cast<std::string>();
  std::string known;
  for (const NamedDevice& each : kDevices) {
    if (name == each.name) return each.limits;
    known += std::string(known.empty() ? "" : ", ") + each.name;
  }
  throw py::value_error("device should be one of " + known + ", but got '" + name + "'");
}

// The clusters by their size, from 2 on.
inline Occupancy occupancy_from(const py::dict& fields) {
  Occupancy result;
  result.blocks = fields["blocks"].cast<int>();
  const auto clusters = fields["clusters"].cast<std::map<int, int>>();
  for (const auto& [size, count] : clusters) {
    if (size < 2 || size > kLargestCluster) {
      throw py::value_error("no cluster has " + std::to_string(size) + " blocks");
    }
    result.clusters[size] = count;
  }
  result.refused = fields["refused"].cast<bool>();
  if (result.blocks < 1) throw py::value_error("a multiprocessor should hold at least a block");
  return result;
}

// Writes the fields that are given.
inline void prescribe(CudaPlanOverride* forced, const Name& strategy, const Name& access,
                      std::optional<int> team, std::optional<int> slots, Count unit_channels,
                      Count units_at_once, std::optional<bool> stream_stores) {
  if (strategy) forced->strategy = index_of(*strategy, kStrategyNames, "strategy");
  if (access) forced->access = index_of(*access, kAccessNames, "access");
  if (team) forced->team = *team;
  if (slots) forced->slots = *slots;
  if (unit_channels) forced->unit_channels = *unit_channels;
  if (units_at_once) forced->units_at_once = *units_at_once;
  if (stream_stores) forced->stream_stores = *stream_stores;
}

inline void force_cuda_plan(const Name& strategy, const Name& access, std::optional<int> team,
                            std::optional<int> slots, Count unit_channels, Count units_at_once,
                            std::optional<bool> stream_stores) {
  CudaPlanOverride forced;
  prescribe(&forced, strategy, access, team, slots, unit_channels, units_at_once, stream_stores);
  cuda_plan_override() = forced;
}

inline py::dict dict_of(const CudaPlan& plan) {
  py::dict result;
  result["mapping"] = kMappingNames[static_cast<int>(plan.mapping)];
  result["access"] = kAccessNames[static_cast<int>(plan.access)];
  result["strategy"] = kStrategyNames[static_cast<int>(plan.strategy)];
  result["team"] = plan.team;
  result["slots"] = plan.slots;
  result["stream_stores"] = plan.stream_stores;
  result["refused"] = plan.refused;
  result["unit_channels"] = plan.unit_channels;
  result["units"] = plan.units;
  result["units_at_once"] = plan.units_at_once;
  result["shared_bytes"] = plan.shared_bytes;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["compulsory_bytes"] = plan.compulsory_bytes;
  result["predicted_bytes"] = plan.predicted_bytes;
  result["blocks"] = plan.blocks();
  return result;
}

inline py::dict cuda_plan(const std::string& layout, const std::string& dtype, std::int64_t n,
                          std::int64_t c, std::int64_t s, const std::string& op,
                          const py::object& device, std::optional<bool> reduces, bool cumulative,
                          bool aligned, bool residual, bool masked, int outputs,
                          const std::optional<py::dict>& occupancy, const Name& strategy,
                          const Name& access, std::optional<int> team, std::optional<int> slots,
                          Count unit_channels, Count units_at_once,
                          std::optional<bool> stream_stores) {
  const Problem problem = problem_from(layout, dtype, n, c, s);
  const Pass pass = pass_from(op);
  const CudaRequest request{problem,    pass,    reduces.value_or(pass != Pass::kEval),
                            cumulative, aligned, residual,
                            masked,     outputs};
  CudaPlanOverride forced = cuda_plan_override();
  prescribe(&forced, strategy, access, team, slots, unit_channels, units_at_once, stream_stores);
  const DeviceLimits limits = device_from(device);
  const Occupancy found =
      occupancy ? occupancy_from(*occupancy) : assumed_occupancy(problem.dtype, limits);
  return dict_of(plan_cuda(request, limits, found, forced));
}

inline void define_cuda_plans(py::module_& m) {
  const py::none none;
  m.def("cuda_devices", &cuda_devices, "The limits of the devices that plan_cuda knows by name.");
  m.def("plan_cuda", &cuda_plan, py::arg("layout"), py::arg("dtype"), py::arg("n"), py::arg("c"),
        py::arg("s"), py::arg("op"), py::kw_only(), py::arg("device") = "h100",
        py::arg("reduces") = none, py::arg("cumulative") = false, py::arg("aligned") = true,
        py::arg("residual") = false, py::arg("masked") = false, py::arg("outputs") = 1,
        py::arg("occupancy") = none, py::arg("strategy") = none, py::arg("access") = none,
        py::arg("team") = none, py::arg("slots") = none, py::arg("unit_channels") = none,
        py::arg("units_at_once") = none, py::arg("stream_stores") = none,
        "How a CUDA call would be cut into work (core/plan_cuda.h). The last seven prescribe.");
  m.def("force_cuda_plan", &force_cuda_plan, py::kw_only(), py::arg("strategy") = none,
        py::arg("access") = none, py::arg("team") = none, py::arg("slots") = none,
        py::arg("unit_channels") = none, py::arg("units_at_once") = none,
        py::arg("stream_stores") = none,
        "Prescribe fields of all CUDA plans from now on; without arguments, none.");
}

}  // namespace bindings
}  // namespace batchnorm
