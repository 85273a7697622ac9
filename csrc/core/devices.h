// CUDA devices by name, to plan for one that is not at hand.
//
// Threads, shared memory and clusters are those of the compute capability (CUDA Programming Guide,
// "Compute Capabilities", technical specifications; 1 KiB of each block's shared memory is reserved
// from 8.0 on). Multiprocessors and second-level cache are the product's, the cache as the driver
// states it; cuda::Device asks for all of them.
#pragma once

#include "core/plan_cuda.h"

namespace batchnorm {

struct NamedDevice {
  const char* name;
  DeviceLimits limits;
};

constexpr std::int64_t kKiB = 1 << 10;
constexpr std::int64_t kMiB = 1 << 20;

// Capability, multiprocessors, threads of one, shared memory of a block, of a multiprocessor and
// reserved, second-level cache, cluster, cooperative launches.
constexpr NamedDevice kDevices[] = {
    {"t4", {75, 40, 1024, 64 * kKiB, 64 * kKiB, 0, 4 * kMiB, 1, true}},
    {"a100", {80, 108, 2048, 163 * kKiB, 164 * kKiB, kKiB, 40 * kMiB, 1, true}},
    {"rtx3090", {86, 82, 1536, 99 * kKiB, 100 * kKiB, kKiB, 6 * kMiB, 1, true}},
    {"l4", {89, 58, 1536, 99 * kKiB, 100 * kKiB, kKiB, 48 * kMiB, 1, true}},
    {"rtx4090", {89, 128, 1536, 99 * kKiB, 100 * kKiB, kKiB, 72 * kMiB, 1, true}},
    {"h100", {90, 132, 2048, 227 * kKiB, 228 * kKiB, kKiB, 50 * kMiB, 8, true}},
    {"h200", {90, 132, 2048, 227 * kKiB, 228 * kKiB, kKiB, 60 * kMiB, 8, true}},
    {"b200", {100, 148, 2048, 227 * kKiB, 228 * kKiB, kKiB, 253 * kMiB / 2, 8, true}},
    {"rtx5090", {120, 170, 1536, 99 * kKiB, 100 * kKiB, kKiB, 96 * kMiB, 8, true}},
};

}  // namespace batchnorm
