// What the plans of core/plan_cuda.cpp rest on, measured on the device at hand: copies of narrow
// columns, barriers, second readings from the second-level cache, clusters at a time, loads that
// wait for each other, launches in a graph.
//
//   nvcc -O3 -std=c++17 -arch=native -o device_facts benchmarks/device_facts.cu
//   ./device_facts [MB]      the matrix that is copied, twice; 1024 by default
//
// Prints one line of JSON for each figure, at once, and before that, on stderr, what is measured.
// Of each, the median of several runs. What fails is a line with its error; then the exit status
// is 1.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace cg = cooperative_groups;

namespace {

constexpr int kThreads = 256;
constexpr int kRuns = 9;
constexpr int kBarriers = 200;
// Loads that a thread has on their way at a time. With the threads that fit these are 80 KB and
// more on a multiprocessor: a multiple of memory's rate times its latency, so that the rate is
// seen.
constexpr int kAtOnce = 4;
constexpr int kRowBytes = 4096;
constexpr int kRowWords = kRowBytes / 16;

// ---- calls --------------------------------------------------------------------------------------

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, not by whoever asks next
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#define CHECK(call) check((call), #call)

template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : bytes_(count * sizeof(T)) {
    void* address = nullptr;
    CHECK(cudaMalloc(&address, bytes_));
    data_ = static_cast<T*>(address);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  // Never zeros: a device may move them faster.
  void fill(int byte) const { CHECK(cudaMemset(data_, byte, bytes_)); }

 private:
  std::size_t bytes_;
  T* data_;
};

struct Device {
  int multiprocessors, l2, shared_per_block, shared_per_multiprocessor, reserved_shared;
  bool has_clusters, is_cooperative;
  cudaStream_t stream;

  // As much as a block can have where so many are on a multiprocessor: what the kernels take.
  std::size_t shared(int blocks_each) const {
    const int share = shared_per_multiprocessor / blocks_each - reserved_shared;
    return static_cast<std::size_t>(std::min(share, shared_per_block));
  }
};

Device ask_device() {
  const auto ask = [](cudaDeviceAttr which) {
    int value = 0;
    CHECK(cudaDeviceGetAttribute(&value, which, 0));
    return value;
  };
  Device d = {};
  d.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  d.l2 = ask(cudaDevAttrL2CacheSize);
  d.shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  d.shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  d.reserved_shared = ask(cudaDevAttrReservedSharedMemoryPerBlock);
  d.has_clusters = ask(cudaDevAttrClusterLaunch) != 0;
  d.is_cooperative = ask(cudaDevAttrCooperativeLaunch) != 0;
  CHECK(cudaStreamCreate(&d.stream));
  return d;
}

// A launch of blocks of kThreads.
struct Launch {
  int blocks = 1;
  std::size_t shared = 0;
  bool cooperative = false;
  int cluster = 1;

  // Calls body(config) with the configuration that this means.
  template <typename Body>
  auto with_config(cudaStream_t stream, const Body& body) const {
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cooperative || cluster > 1 ? 1 : 0;
    if (cooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else if (cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    return body(config);
  }
};

template <typename... Parameters, typename... Arguments>
void launch(const Device& d, const Launch& how, void (*kernel)(Parameters...),
            Arguments... arguments) {
  how.with_config(d.stream, [&](const cudaLaunchConfig_t& config) {
    CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  });
}

template <typename Kernel>
void permit_shared(Kernel* kernel, std::size_t bytes) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
}

// As many blocks as the device holds at a time.
template <typename Kernel>
int full_grid(const Device& d, Kernel* kernel) {
  int each = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0));
  return each * d.multiprocessors;
}

// Milliseconds of what is put on the stream, the median of kRuns after a first one.
double time_of(const Device& d, const std::function<void()>& put) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run <= kRuns; ++run) {
    CHECK(cudaEventRecord(begin, d.stream));
    put();
    CHECK(cudaEventRecord(end, d.stream));
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

// ---- output -------------------------------------------------------------------------------------

bool has_failed = false;

// {"fact": name, and what the format makes of the values}, all of it one line.
__attribute__((format(printf, 2, 3))) void fact(const char* name, const char* format, ...) {
  std::printf("{\"fact\": \"%s\", ", name);
  va_list values;
  va_start(values, format);
  std::vprintf(format, values);
  va_end(values);
  std::printf("}\n");
  std::fflush(stdout);
}

// A measurement by its name. One that fails does not keep the others from being made.
void measure(const char* name, const std::function<void()>& body) {
  std::fprintf(stderr, "%s\n", name);
  try {
    body();
  } catch (const std::runtime_error& error) {
    has_failed = true;
    std::string text = error.what();
    std::replace(text.begin(), text.end(), '"', '\'');
    fact(name, "\"error\": \"%s\"", text.c_str());
  }
}

const char* truth(bool value) { return value ? "true" : "false"; }

// ---- copies -------------------------------------------------------------------------------------

// Copies `rows` rows of kRowWords words by groups of `width` neighbouring columns. Apart, all
// blocks do one group after the other, in an order in which neighbours are far from each other in
// time: nothing of a row's memory line serves a second group. Together, each block has a group of
// its own.
__global__ void copy_columns_kernel(const uint4* __restrict__ from, uint4* __restrict__ to,
                                    long long rows, int width, bool together) {
  const int groups = kRowWords / width, side_by_side = kThreads / width;
  const int column = threadIdx.x % width, row_in_block = threadIdx.x / width;
  const int grid = static_cast<int>(gridDim.x), index = static_cast<int>(blockIdx.x);
  const int at_a_time = !together ? 1 : groups < grid ? groups : grid;
  const int blocks = grid / at_a_time, rank = index / at_a_time;
  if (rank >= blocks) return;  // too few are left for all of these groups
  const long long step = static_cast<long long>(blocks) * side_by_side;
  const long long first = static_cast<long long>(rank) * side_by_side + row_in_block;
  for (int i = index % at_a_time; i < groups; i += at_a_time) {
    const int group = together ? i : i * 37 % groups;
    const int at = group * width + column;
    for (long long row = first; row < rows; row += kAtOnce * step) {
      uint4 words[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const long long other = row + k * step;
        if (other < rows) words[k] = from[other * kRowWords + at];
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const long long other = row + k * step;
        if (other < rows) to[other * kRowWords + at] = words[k];
      }
    }
  }
}

struct Matrix {
  explicit Matrix(long long megabytes)
      : rows((megabytes << 20) / kRowBytes),
        from(static_cast<std::size_t>(rows) * kRowWords),
        to(static_cast<std::size_t>(rows) * kRowWords) {
    from.fill(1);
  }
  double gigabytes_per_second(double milliseconds) const {
    return 2e-6 * static_cast<double>(from.bytes()) / milliseconds;
  }
  // Both ends of it: a figure of a copy that copies something else is worth nothing.
  void require_copied() const {
    std::vector<unsigned char> ends(2 * kRowBytes);
    const auto* const bytes = reinterpret_cast<const unsigned char*>(to.get());
    CHECK(cudaMemcpy(ends.data(), bytes, kRowBytes, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(ends.data() + kRowBytes, bytes + to.bytes() - kRowBytes, kRowBytes,
                     cudaMemcpyDeviceToHost));
    const bool is_copied =
        std::all_of(ends.begin(), ends.end(), [](unsigned char byte) { return byte == 1; });
    if (!is_copied) throw std::runtime_error("the matrix was not copied");
  }

  long long rows;
  Buffer<uint4> from, to;
};

double copy_rate(const Device& d, const Matrix& m, int blocks, int row_bytes, bool together) {
  m.to.fill(2);
  const double time = time_of(d, [&] {
    launch(d, {blocks}, copy_columns_kernel, m.from.get(), m.to.get(), m.rows, row_bytes / 16,
           together);
  });
  m.require_copied();
  return m.gigabytes_per_second(time);
}

void measure_copies(const Device& d, long long megabytes) {
  const Matrix m(megabytes);
  const int all = full_grid(d, copy_columns_kernel);
  const double whole = time_of(d, [&] {
    CHECK(cudaMemcpyAsync(m.to.get(), m.from.get(), m.from.bytes(), cudaMemcpyDeviceToDevice,
                          d.stream));
  });
  fact("copy", "\"GB_per_s\": %.1f", m.gigabytes_per_second(whole));
  for (const int bytes : {32, 64, 128, 256, 512, kRowBytes}) {
    for (const bool together : {false, true}) {
      fact("copy of columns", "\"row_bytes\": %d, \"neighbours_together\": %s, \"GB_per_s\": %.1f",
           bytes, truth(together), copy_rate(d, m, all, bytes, together));
    }
  }
  for (int tenths = 2; tenths <= 10; ++tenths) {
    fact("copy by a part of the device", "\"tenths\": %d, \"GB_per_s\": %.1f", tenths,
         copy_rate(d, m, std::max(all * tenths / 10, 1), kRowBytes, false));
  }
}

// ---- second readings ----------------------------------------------------------------------------

// Reads all words `times` times; every second time from the end on, if asked to.
__global__ void read_kernel(const uint4* __restrict__ from, long long words, int times,
                            bool reverses, unsigned* sink) {
  unsigned sum = 0;
  const long long step = static_cast<long long>(gridDim.x) * kThreads;
  const long long first = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  for (int i = 0; i < times; ++i) {
    const bool backwards = reverses && i % 2 == 1;
    for (long long at = first; at < words; at += kAtOnce * step) {
      uint4 loaded[kAtOnce] = {};
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const long long other = at + k * step;
        if (other < words) loaded[k] = __ldcg(from + (backwards ? words - 1 - other : other));
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        sum += loaded[k].x ^ loaded[k].y ^ loaded[k].z ^ loaded[k].w;
      }
    }
  }
  if (sum == 0xdeadbeef) *sink = sum;
}

void measure_cache(const Device& d) {
  constexpr int kTimes = 21;
  const long long l2_words = d.l2 / 16;
  const Buffer<uint4> from(static_cast<std::size_t>(l2_words * 3 / 2));
  const Buffer<unsigned> sink(1);
  from.fill(1);
  const int blocks = full_grid(d, read_kernel);
  for (int eighths = 1; eighths <= 12; ++eighths) {
    const long long words = l2_words * eighths / 8;
    for (const bool reverses : {false, true}) {
      const auto time = [&](int times) {
        return time_of(d, [&] {
          launch(d, {blocks}, read_kernel, from.get(), words, times, reverses, sink.get());
        });
      };
      // Less the first reading: that one comes from wherever the run before left it.
      const double milliseconds = (time(kTimes) - time(1)) / (kTimes - 1);
      fact("read again", "\"l2_eighths\": %d, \"MB\": %.2f, \"reverses\": %s, \"GB_per_s\": %.1f",
           eighths, static_cast<double>(words) * 16 / 1048576, truth(reverses),
           16e-6 * static_cast<double>(words) / milliseconds);
    }
  }
}

// ---- barriers -----------------------------------------------------------------------------------

__global__ void grid_barrier_kernel(int times) {
  for (int i = 0; i < times; ++i) cg::this_grid().sync();
}

__global__ void cluster_barrier_kernel(int times) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  for (int i = 0; i < times; ++i) cg::this_cluster().sync();
#endif
}

// Microseconds of one of kBarriers barriers, less the kernel without.
double barrier_time(const Device& d, const Launch& how, void (*kernel)(int)) {
  const auto run = [&](int times) { return time_of(d, [&] { launch(d, how, kernel, times); }); };
  return (run(kBarriers) - run(0)) * 1e3 / kBarriers;
}

void measure_grid_barriers(const Device& d) {
  if (!d.is_cooperative) return;
  for (const int each : {1, 2}) {
    const Launch how{each * d.multiprocessors, d.shared(each), /*cooperative=*/true};
    permit_shared(grid_barrier_kernel, how.shared);
    fact("grid barrier", "\"blocks_per_multiprocessor\": %d, \"shared_bytes\": %zu, \"us\": %.3f",
         each, how.shared, barrier_time(d, how, grid_barrier_kernel));
  }
}

// How many clusters are active at a time, or why none of this size can be.
cudaError_t active_clusters(const Launch& how, int* clusters) {
  return how.with_config(nullptr, [&](const cudaLaunchConfig_t& config) {
    return cudaOccupancyMaxActiveClusters(clusters, cluster_barrier_kernel, &config);
  });
}

void measure_clusters(const Device& d) {
  if (!d.has_clusters) return;
  for (const int each : {1, 2}) {
    for (int size = 2; size <= 8; ++size) {
      Launch how{size, d.shared(each), /*cooperative=*/false, size};
      permit_shared(cluster_barrier_kernel, how.shared);
      int clusters = 0;
      const cudaError_t error = active_clusters(how, &clusters);
      if (error != cudaSuccess) cudaGetLastError();
      fact(
          "active clusters",
          "\"blocks\": %d, \"blocks_per_multiprocessor\": %d, \"clusters\": %d, \"answer\": \"%s\"",
          size, each, clusters, cudaGetErrorName(error));
      if (error != cudaSuccess || clusters == 0) continue;
      how.blocks = clusters * size;
      fact("cluster barrier", "\"blocks\": %d, \"blocks_per_multiprocessor\": %d, \"us\": %.3f",
           size, each, barrier_time(d, how, cluster_barrier_kernel));
    }
  }
}

// ---- loads that wait for each other
// ---------------------------------------------------------------

// Rounds of loads from places that no cache has, each round after the one before; within a round
// one after the other, or at once. All bytes of the memory are the same, so that where the loads go
// depends on what was loaded for the compiler and the hardware alone.
template <int kLoads, bool kInTurn>
__global__ void cold_loads_kernel(const unsigned* __restrict__ from, unsigned words, int rounds,
                                  unsigned* sink) {
  if (threadIdx.x > 0) return;
  unsigned at = 1;
  for (int round = 0; round < rounds; ++round) {
    unsigned loaded = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      at = at * 1664525u + 1013904223u + (kInTurn ? loaded : 0);
      const unsigned word = __ldcg(from + (at >> 4) % words);
      loaded = kInTurn ? word : loaded + word;
    }
    at += loaded;
  }
  *sink = at;
}

template <int kLoads, bool kInTurn>
void measure_loads(const Device& d, const Buffer<unsigned>& memory) {
  constexpr int kRounds = 1000;
  const Buffer<unsigned> sink(1);
  const auto words = static_cast<unsigned>(memory.bytes() / sizeof(unsigned));
  const auto time = [&](int rounds) {
    return time_of(d, [&] {
      launch(d, {1}, cold_loads_kernel<kLoads, kInTurn>, memory.get(), words, rounds, sink.get());
    });
  };
  fact("cold loads", "\"loads\": %d, \"in_turn\": %s, \"us\": %.3f", kLoads, truth(kInTurn),
       (time(kRounds) - time(0)) * 1e3 / kRounds);
}

void measure_cold_loads(const Device& d, long long megabytes) {
  const Buffer<unsigned> memory(static_cast<std::size_t>(megabytes << 20) / sizeof(unsigned));
  memory.fill(1);
  measure_loads<1, true>(d, memory);
  measure_loads<2, true>(d, memory);
  measure_loads<4, true>(d, memory);
  measure_loads<2, false>(d, memory);
  measure_loads<4, false>(d, memory);
}

// ---- graphs -------------------------------------------------------------------------------------

__global__ void empty_kernel(int) {}

// Microseconds of a kernel that does nothing, as one of many nodes of a graph.
void measure_nodes(const Device& d) {
  constexpr int kNodes = 200;
  for (const bool cooperative : {false, true}) {
    if (cooperative && !d.is_cooperative) continue;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < kNodes; ++i) {
      launch(d, {d.multiprocessors, 0, cooperative}, empty_kernel, 0);
    }
    CHECK(cudaStreamEndCapture(d.stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    const double time = time_of(d, [&] { CHECK(cudaGraphLaunch(executable, d.stream)); });
    fact("node of a graph", "\"cooperative\": %s, \"us\": %.3f", truth(cooperative),
         time * 1e3 / kNodes);
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(graph));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const long long megabytes = argc > 1 ? std::atoll(argv[1]) : 1024;
  Device device = {};
  measure("device", [&] {
    device = ask_device();
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    fact("device", "\"name\": \"%s\", \"multiprocessors\": %d, \"l2_MB\": %.1f", properties.name,
         device.multiprocessors, device.l2 / 1048576.0);
  });
  if (has_failed) return 1;
  measure("copies", [&] { measure_copies(device, megabytes); });
  measure("second readings", [&] { measure_cache(device); });
  measure("grid barriers", [&] { measure_grid_barriers(device); });
  measure("clusters", [&] { measure_clusters(device); });
  measure("cold loads", [&] { measure_cold_loads(device, megabytes); });
  measure("nodes of a graph", [&] { measure_nodes(device); });
  CHECK(cudaStreamDestroy(device.stream));
  return has_failed ? 1 : 0;
}
