// What the emulated devices answer and refuse, as CUDA's documentation says of real ones.
// Prints what was not as it should be; its last line is how many checks were done.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "selftest.h"

namespace {

int checks = 0, failures = 0;

template <typename T>
void expect(const char* what, T got, T wanted) {
  ++checks;
  if (got == wanted) return;
  ++failures;
  std::printf("%s: %lld, not %lld\n", what, static_cast<long long>(got),
              static_cast<long long>(wanted));
}

__global__ void nothing() {}
__global__ void nothing_else() {}
__global__ void use_dynamic(char* out) {
  if (threadIdx.x == 0) *out = dynamic_shared<char>()[0];
}

struct Large {
  char bytes[40 << 10];
};
__global__ void use_static() { block_shared<Large>().bytes[threadIdx.x] = 1; }

int attribute(cudaDeviceAttr which) {
  int value = -1;
  expect("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, 0), cudaSuccess);
  return value;
}

template <typename Kernel>
int occupancy(Kernel* kernel, int threads, std::size_t dynamic_shared) {
  int blocks = -1;
  expect("cudaOccupancyMaxActiveBlocksPerMultiprocessor",
         cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, dynamic_shared),
         cudaSuccess);
  return blocks;
}

void test_attributes() {
  emulation::set_device({});
  expect("multiprocessors", attribute(cudaDevAttrMultiProcessorCount), 8);
  expect("major", attribute(cudaDevAttrComputeCapabilityMajor), 9);
  expect("minor", attribute(cudaDevAttrComputeCapabilityMinor), 0);
  expect("opt-in", attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), 227 << 10);
  expect("without", attribute(cudaDevAttrMaxSharedMemoryPerBlock), 48 << 10);
  expect("shared", attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), 228 << 10);
  expect("reserved", attribute(cudaDevAttrReservedSharedMemoryPerBlock), 1 << 10);
  expect("L2", attribute(cudaDevAttrL2CacheSize), 50 << 20);
  expect("threads", attribute(cudaDevAttrMaxThreadsPerMultiProcessor), 2048);
  expect("registers", attribute(cudaDevAttrMaxRegistersPerMultiprocessor), 65536);
  expect("cooperative", attribute(cudaDevAttrCooperativeLaunch), 1);
  expect("warp", attribute(cudaDevAttrWarpSize), 32);
  cudaFuncAttributes attributes = {};
  emulation::set_device({.code_architecture = 80});
  expect("of older code", cudaFuncGetAttributes(&attributes, nothing), cudaSuccess);
  expect("what it was compiled for", attributes.ptxVersion, 80);
  expect("what it became", attributes.binaryVersion, 90);
  emulation::set_device(emulation::Device::turing());
  expect("Turing's clusters", attribute(cudaDevAttrClusterLaunch), 0);
  expect("Turing's threads", attribute(cudaDevAttrMaxThreadsPerMultiProcessor), 1024);
  int count = 0, value = 0;
  expect("cudaGetDeviceCount", cudaGetDeviceCount(&count), cudaSuccess);
  expect("devices", count, 1);
  expect("cudaGetDevice", cudaGetDevice(&value), cudaSuccess);
  expect("device", value, 0);
  expect("another device", cudaSetDevice(1), cudaErrorInvalidDevice);
  expect("of another device", cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 1),
         cudaErrorInvalidDevice);
  expect("no such attribute",
         cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(100000), 0),
         cudaErrorInvalidValue);
}

void test_memory() {
  void *address = nullptr, *none = &address;
  expect("cudaMalloc", cudaMalloc(&address, 3), cudaSuccess);
  expect("aligned", static_cast<int>(reinterpret_cast<std::uintptr_t>(address) % 256), 0);
  expect("to", cudaMemcpy(address, "ab", 3, cudaMemcpyHostToDevice), cudaSuccess);
  char back[3] = {};
  expect("from", cudaMemcpy(back, address, 3, cudaMemcpyDeviceToHost), cudaSuccess);
  expect("copied", std::string(back) == "ab", true);
  expect("cudaFree", cudaFree(address), cudaSuccess);
  expect("cudaMalloc of nothing", cudaMalloc(&none, 0), cudaSuccess);
  expect("nothing", none == nullptr, true);
  expect("cudaFree of nothing", cudaFree(none), cudaSuccess);
}

void test_dimensions() {
  emulation::set_device({});
  const auto refused = cudaErrorInvalidConfiguration;
  expect("largest block", launch({.block = 1024}, nothing), cudaSuccess);
  expect("block", launch({.block = 1025}, nothing), refused);
  expect("block of none", launch({.block = 0}, nothing), refused);
  expect("block's z", launch({.block = dim3(1, 1, 65)}, nothing), refused);
  expect("grid of none", launch({.grid = 0}, nothing), refused);
  expect("grid's y", launch({.grid = dim3(1, 65536)}, nothing), refused);
  expect("peek", cudaPeekAtLastError(), refused);
  expect("get", cudaGetLastError(), refused);
  expect("get again", cudaGetLastError(), cudaSuccess);
  expect("name", std::string(cudaGetErrorName(refused)) == "cudaErrorInvalidConfiguration", true);
}

void test_dynamic_shared() {
  emulation::set_device({});
  const auto which = cudaFuncAttributeMaxDynamicSharedMemorySize;
  char out = 0;
  const auto with = [&](int bytes) {
    return launch({.dynamic_shared = static_cast<std::size_t>(bytes)}, use_dynamic, &out);
  };
  expect("48 KiB", with(48 << 10), cudaSuccess);
  expect("more without leave", with((48 << 10) + 1), cudaErrorInvalidValue);
  expect("occupancy without leave", occupancy(use_dynamic, 32, (48 << 10) + 1), 0);
  expect("leave", cudaFuncSetAttribute(use_dynamic, which, 100 << 10), cudaSuccess);
  expect("more with leave", with(100 << 10), cudaSuccess);
  expect("more than the leave", with((100 << 10) + 1), cudaErrorInvalidValue);
  expect("largest leave", cudaFuncSetAttribute(use_dynamic, which, 227 << 10), cudaSuccess);
  expect("larger leave", cudaFuncSetAttribute(use_dynamic, which, (227 << 10) + 1),
         cudaErrorInvalidValue);
  cudaFuncAttributes attributes = {};
  expect("cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, use_dynamic), cudaSuccess);
  expect("leave given", attributes.maxDynamicSharedSizeBytes, 227 << 10);
  expect("another kernel's", launch({.dynamic_shared = 49 << 10}, nothing), cudaErrorInvalidValue);
  emulation::set_device({});
  expect("leave on another device", with(100 << 10), cudaErrorInvalidValue);
}

void test_clusters() {
  emulation::set_device({});
  const auto invalid = cudaErrorInvalidClusterSize;
  expect("cluster", launch({.grid = 16, .cluster = 8}, nothing), cudaSuccess);
  expect("cluster of 16", launch({.grid = 16, .cluster = 16}, nothing), invalid);
  const auto which = cudaFuncAttributeNonPortableClusterSizeAllowed;
  expect("leave", cudaFuncSetAttribute(nothing, which, 1), cudaSuccess);
  expect("cluster of 16 with leave", launch({.grid = 16, .cluster = 16}, nothing), cudaSuccess);
  expect("cluster of 17", launch({.grid = 17, .cluster = 17}, nothing), invalid);
  expect("no multiple", launch({.grid = 9, .cluster = 2}, nothing), cudaErrorInvalidConfiguration);
  emulation::set_device({.odd_clusters = false});
  expect("cluster of 3", launch({.grid = 3, .cluster = 3}, nothing), invalid);
  expect("cluster of 4", launch({.grid = 4, .cluster = 4}, nothing), cudaSuccess);
  emulation::set_device(emulation::Device::turing());
  const cudaError_t error = launch({.grid = 16, .cluster = 8}, nothing);
  expect("cluster on Turing", error != cudaSuccess, true);
  expect("block alone on Turing", launch({.grid = 16, .cluster = 1}, nothing), cudaSuccess);
}

void test_cooperative() {
  emulation::set_device({.multiprocessors = 2, .threads_per_multiprocessor = 1024});
  const auto blocks = [](unsigned count) {
    return launch({.grid = count, .block = 512, .cooperative = true}, nothing);
  };
  expect("a full device", blocks(4), cudaSuccess);
  expect("one more", blocks(5), cudaErrorCooperativeLaunchTooLarge);
  emulation::set_device(
      {.multiprocessors = 4, .threads_per_multiprocessor = 1024, .held_multiprocessors = 1});
  const std::uint64_t refusals = emulation::counts().refusals;
  expect("all that others leave", blocks(6), cudaSuccess);
  expect("what others have", blocks(7), cudaErrorCooperativeLaunchTooLarge);
  expect("refusals", emulation::counts().refusals, refusals + 1);
  emulation::set_device({.multiprocessors = 2, .cooperative_launch = false});
  expect("unsupported", blocks(1), cudaErrorNotSupported);
}

void test_occupancy() {
  emulation::set_device({.multiprocessors = 4});
  expect("by threads", occupancy(nothing, 256, 0), 8);
  expect("by whole warps", occupancy(nothing, 257, 0), 7);
  expect("by blocks", occupancy(nothing, 32, 0), 32);
  expect("by shared memory", occupancy(nothing, 32, 37 << 10), 6);
  expect("by nothing that fits", occupancy(nothing, 1025, 0), 0);
  emulation::set_device({.multiprocessors = 4, .registers_per_thread = 192});
  expect("by registers", occupancy(nothing, 256, 0), 1);
  emulation::set_device({.multiprocessors = 4});
  expect("before it has run", occupancy(use_static, 32, 0), 32);
  expect("run", launch({}, use_static), cudaSuccess);
  expect("after it has run", occupancy(use_static, 32, 0), 5);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {8, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(8);
  config.blockDim = dim3(512);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = -1;
  expect("cudaOccupancyMaxActiveClusters",
         cudaOccupancyMaxActiveClusters(&clusters, nothing_else, &config), cudaSuccess);
  expect("clusters", clusters, 2);
}

void test_copies() {
  std::vector<int> x(10, 7), y(10);
  const std::size_t bytes = x.size() * sizeof(int);
  expect("copy", cudaMemcpyAsync(y.data(), x.data(), bytes, cudaMemcpyDefault, nullptr),
         cudaSuccess);
  expect("copied", y == x, true);
  expect("set", cudaMemsetAsync(y.data(), 0, bytes, nullptr), cudaSuccess);
  expect("cleared", y == std::vector<int>(10), true);
}

}  // namespace

int main() {
  test_attributes();
  test_memory();
  test_dimensions();
  test_dynamic_shared();
  test_clusters();
  test_cooperative();
  test_occupancy();
  test_copies();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
