// What the plans of core/plan_cuda.cpp rest on, measured on the device at hand: copies of narrow
// columns, barriers, reads from the second-level cache, clusters at a time, launches in a graph.
//
//   nvcc -O3 -std=c++17 -arch=native -o device_facts benchmarks/device_facts.cu && ./device_facts
//
// Prints one line of JSON for each figure. Of each, the median of several runs.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace cg = cooperative_groups;

namespace {

constexpr int kThreads = 256;
constexpr int kRuns = 9;
constexpr int kBarriers = 200;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check((call), #call)

// Milliseconds of what is put on the stream, the median of kRuns after a first one.
double time_of(cudaStream_t stream, const std::function<void()>& put) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run <= kRuns; ++run) {
    CHECK(cudaEventRecord(begin, stream));
    put();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (run > 0) times.push_back(milliseconds);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, std::size_t shared, cudaStream_t stream,
            bool cooperative, int cluster, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// ---- kernels ------------------------------------------------------------------------------------

// Copies columns [first, first + width) of a matrix whose rows are `stride` apart, in 16-byte words.
__global__ void copy_columns_kernel(const uint4* from, uint4* to, long long rows, int width,
                                    int stride) {
  const int groups = kThreads / width;
  const int column = threadIdx.x % width + blockIdx.y * width, group = threadIdx.x / width;
  if (group >= groups) return;
  const long long step = static_cast<long long>(gridDim.x) * groups;
  for (long long row = blockIdx.x * groups + group; row < rows; row += step) {
    to[row * stride + column] = from[row * stride + column];
  }
}

__global__ void read_kernel(const uint4* from, long long words, int times, unsigned* sink) {
  unsigned sum = 0;
  const long long step = static_cast<long long>(gridDim.x) * kThreads;
  for (int i = 0; i < times; ++i) {
    for (long long at = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; at < words;
         at += step) {
      const uint4 word = __ldcg(from + at);
      sum += word.x ^ word.y ^ word.z ^ word.w;
    }
  }
  if (sum == 0xdeadbeef) *sink = sum;
}

__global__ void grid_barrier_kernel(int times) {
  for (int i = 0; i < times; ++i) cg::this_grid().sync();
}

__global__ void cluster_barrier_kernel(int times) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < times; ++i) cg::this_cluster().sync();
#endif
}

__global__ void empty_kernel(int) {}

// ---- measurements -------------------------------------------------------------------------------

struct Device {
  cudaDeviceProp properties;
  cudaStream_t stream;
  bool has_clusters() const { return properties.major >= 9; }
};

void measure_copies(const Device& d) {
  constexpr long long kBytes = 1ll << 30;
  constexpr int kRowBytes = 4096;
  uint4 *from, *to;
  CHECK(cudaMalloc(&from, kBytes));
  CHECK(cudaMalloc(&to, kBytes));
  CHECK(cudaMemset(from, 1, kBytes));
  const long long rows = kBytes / kRowBytes;
  const double whole = time_of(d.stream, [&] {
    CHECK(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, d.stream));
  });
  std::printf("{\"fact\": \"copy\", \"GB_per_s\": %.1f}\n", 2e-6 * kBytes / whole);
  for (const int bytes : {32, 64, 128, 256, 512, 4096}) {
    const int width = bytes / 16, groups = kRowBytes / bytes;
    // One launch per group: other groups' rows are not on their way at the same time.
    const double time = time_of(d.stream, [&] {
      for (int g = 0; g < groups; ++g) {
        launch(copy_columns_kernel, 4 * d.properties.multiProcessorCount, 0, d.stream, false, 1,
               from + g * width, to + g * width, rows, width, kRowBytes / 16);
      }
    });
    std::printf("{\"fact\": \"copy of columns\", \"row_bytes\": %d, \"GB_per_s\": %.1f}\n", bytes,
                2e-6 * kBytes / time);
  }
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
}

void measure_cache(const Device& d) {
  constexpr int kTimes = 20;
  uint4* from;
  unsigned* sink;
  CHECK(cudaMalloc(&from, 256ll << 20));
  CHECK(cudaMalloc(&sink, sizeof(unsigned)));
  CHECK(cudaMemset(from, 1, 256ll << 20));
  for (const int megabytes : {4, 8, 16, 24, 32, 40, 48, 64, 96, 128, 256}) {
    const long long words = (static_cast<long long>(megabytes) << 20) / 16;
    const double time = time_of(d.stream, [&] {
      launch(read_kernel, 8 * d.properties.multiProcessorCount, 0, d.stream, false, 1, from, words,
             kTimes, sink);
    });
    std::printf("{\"fact\": \"read again\", \"MB\": %d, \"GB_per_s\": %.1f}\n", megabytes,
                kTimes * 16e-6 * static_cast<double>(words) / time);
  }
  CHECK(cudaFree(from));
  CHECK(cudaFree(sink));
}

// Microseconds of one of kBarriers barriers, less the kernel without.
template <typename Kernel>
double barrier_time(const Device& d, Kernel kernel, int blocks, std::size_t shared,
                    bool cooperative, int cluster) {
  const auto run = [&](int times) {
    return time_of(d.stream,
                   [&] { launch(kernel, blocks, shared, d.stream, cooperative, cluster, times); });
  };
  return (run(kBarriers) - run(0)) * 1e3 / kBarriers;
}

void measure_barriers(const Device& d) {
  for (const int each : {1, 2}) {
    const int blocks = each * d.properties.multiProcessorCount;
    const std::size_t shared = d.properties.sharedMemPerMultiprocessor / each - 2048;
    CHECK(cudaFuncSetAttribute(grid_barrier_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)));
    std::printf("{\"fact\": \"grid barrier\", \"blocks_per_multiprocessor\": %d, \"us\": %.3f}\n",
                each, barrier_time(d, grid_barrier_kernel, blocks, shared, true, 1));
  }
  if (!d.has_clusters()) return;
  for (const int cluster : {2, 4, 8}) {
    std::printf("{\"fact\": \"cluster barrier\", \"blocks\": %d, \"us\": %.3f}\n", cluster,
                barrier_time(d, cluster_barrier_kernel, cluster * 16, 0, false, cluster));
  }
}

void count_clusters(const Device& d) {
  if (!d.has_clusters()) return;
  for (const int cluster : {2, 4, 8}) {
    for (const int kilobytes : {111, 223}) {
      const int shared = kilobytes << 10;
      CHECK(cudaFuncSetAttribute(cluster_barrier_kernel,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<unsigned>(cluster));
      config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = static_cast<std::size_t>(shared);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      CHECK(cudaOccupancyMaxActiveClusters(&clusters, cluster_barrier_kernel, &config));
      std::printf(
          "{\"fact\": \"active clusters\", \"blocks\": %d, \"shared_KiB\": %d, \"clusters\": %d}\n",
          cluster, kilobytes, clusters);
    }
  }
}

// Microseconds of a kernel that does nothing, as one of many nodes of a graph.
void measure_nodes(const Device& d) {
  constexpr int kNodes = 200;
  for (const bool cooperative : {false, true}) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < kNodes; ++i) {
      launch(empty_kernel, d.properties.multiProcessorCount, 0, d.stream, cooperative, 1, 0);
    }
    CHECK(cudaStreamEndCapture(d.stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    const double time =
        time_of(d.stream, [&] { CHECK(cudaGraphLaunch(executable, d.stream)); });
    std::printf("{\"fact\": \"node of a graph\", \"cooperative\": %s, \"us\": %.3f}\n",
                cooperative ? "true" : "false", time * 1e3 / kNodes);
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(graph));
  }
}

}  // namespace

int main() {
  Device device;
  CHECK(cudaGetDeviceProperties(&device.properties, 0));
  CHECK(cudaStreamCreate(&device.stream));
  std::printf("{\"fact\": \"device\", \"name\": \"%s\", \"multiprocessors\": %d, \"l2_MB\": %.1f}\n",
              device.properties.name, device.properties.multiProcessorCount,
              device.properties.l2CacheSize / 1048576.0);
  measure_copies(device);
  measure_cache(device);
  measure_barriers(device);
  count_clusters(device);
  measure_nodes(device);
  CHECK(cudaStreamDestroy(device.stream));
  return 0;
}
