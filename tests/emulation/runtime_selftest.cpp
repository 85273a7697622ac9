// Small right kernels, one for each thing that the emulation supplies, under several seeds.
// Prints what was not as it should be; its last line is how many checks were done.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <set>
#include <thread>
#include <vector>

#include "selftest.h"

namespace {

namespace cg = cooperative_groups;

int checks = 0, failures = 0;

#define CHECK(condition)                                                \
  do {                                                                  \
    ++checks;                                                           \
    if (!(condition)) {                                                 \
      ++failures;                                                       \
      std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
    }                                                                   \
  } while (false)

constexpr unsigned kAll = 0xffffffffu;

// ---- where a thread is --------------------------------------------------------------------------

__global__ void count_visits(unsigned* visits, int* order, unsigned* turn) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned index = block * blockDim.x * blockDim.y * blockDim.z + thread;
  atomicAdd(&visits[index], 1u);
  order[atomicAdd(turn, 1u)] = static_cast<int>(index);
}

std::vector<int> visiting_order(std::uint64_t seed) {
  const Shape shape{.grid = dim3(3, 2, 2), .block = dim3(5, 3, 2)};
  std::vector<unsigned> visits(12 * 30);
  std::vector<int> order(visits.size());
  unsigned turn = 0;
  emulation::set_seed(seed);
  CHECK(launch(shape, count_visits, visits.data(), order.data(), &turn) == cudaSuccess);
  CHECK(visits == std::vector<unsigned>(visits.size(), 1));
  return order;
}

void test_every_thread_runs_once() {
  CHECK(visiting_order(1) == visiting_order(1));
  CHECK(visiting_order(1) != visiting_order(2));
}

// ---- warps --------------------------------------------------------------------------------------

struct Shuffled {
  int from_three, from_xor, from_down, from_up, narrow_xor, narrow_down;
};

__global__ void shuffle_all_ways(Shuffled* out) {
  const int value = static_cast<int>(threadIdx.x);
  Shuffled& mine = out[threadIdx.x];
  mine.from_three = __shfl_sync(kAll, value, 3);
  mine.from_xor = __shfl_xor_sync(kAll, value, 1);
  mine.from_down = __shfl_down_sync(kAll, value, 2);
  mine.from_up = __shfl_up_sync(kAll, value, 1);
  mine.narrow_xor = __shfl_xor_sync(kAll, value, 4, 8);
  mine.narrow_down = __shfl_down_sync(kAll, value, 3, 8);
}

// The second of two warps has 8 lanes; what is read from the others is -1.
void test_shuffles() {
  std::vector<Shuffled> out(40);
  CHECK(launch(Shape{.block = 40}, shuffle_all_ways, out.data()) == cudaSuccess);
  for (int rank = 0; rank < 40; ++rank) {
    const Shuffled& got = out[static_cast<std::size_t>(rank)];
    const int lane = rank % 32, first = rank - lane;
    const int down = lane + 2 < 32 ? rank + 2 : rank;
    CHECK(got.from_three == first + 3);
    CHECK(got.from_xor == (rank ^ 1));
    CHECK(got.from_down == (down < 40 ? down : -1));
    CHECK(got.from_up == (lane == 0 ? rank : rank - 1));
    CHECK(got.narrow_xor == (rank ^ 4));
    CHECK(got.narrow_down == (lane % 8 + 3 < 8 ? rank + 3 : rank));
  }
}

struct Votes {
  unsigned odd_lanes, half, after_return;
  int any, all;
  double wide;
};

__global__ void vote(Votes* out) {
  const unsigned lane = threadIdx.x;
  Votes& mine = out[lane];
  mine.odd_lanes = __ballot_sync(kAll, lane % 2);
  mine.any = __any_sync(kAll, lane == 7);
  mine.all = __all_sync(kAll, lane < 31);
  // Two meetings at one line, which do not wait for each other.
  const unsigned half = lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  mine.half = __ballot_sync(half, 1);
  __syncwarp(half);
  mine.wide = __shfl_xor_sync(half, 0.5 * lane, 2);
  if (lane >= 20) return;
  mine.after_return = __ballot_sync(kAll, 1);
}

void test_votes() {
  std::vector<Votes> out(32);
  CHECK(launch(Shape{}, vote, out.data()) == cudaSuccess);
  for (unsigned lane = 0; lane < 32; ++lane) {
    CHECK(out[lane].odd_lanes == 0xaaaaaaaau);
    CHECK(out[lane].any == 1);
    CHECK(out[lane].all == 0);
    CHECK(out[lane].half == (lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau));
    CHECK(out[lane].wide == 0.5 * (lane ^ 2));
    if (lane < 20) CHECK((out[lane].after_return & 0xfffffu) == 0xfffffu);
  }
}

// ---- barriers -----------------------------------------------------------------------------------

struct Row {
  int values[100];
};

__global__ void rotate(int* out, int turns) {
  Row& row = block_shared<Row>();
  int value = static_cast<int>(threadIdx.x);
  for (int turn = 0; turn < turns; ++turn) {
    row.values[threadIdx.x] = value;
    __syncthreads();
    value = row.values[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

void test_block_barrier() {
  std::vector<int> out(300);
  CHECK(launch(Shape{.grid = 3, .block = 100}, rotate, out.data(), 7) == cudaSuccess);
  for (int i = 0; i < 300; ++i) CHECK(out[static_cast<std::size_t>(i)] == (i % 100 + 7) % 100);
}

__global__ void sum_of_cluster(int* out) {
  const cg::cluster_group cluster = cg::this_cluster();
  Row& row = block_shared<Row>();
  int* dynamic = dynamic_shared<int>();
  row.values[threadIdx.x] = static_cast<int>(cluster.block_rank() * blockDim.x + threadIdx.x);
  dynamic[threadIdx.x] = 1;
  cluster.sync();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
    sum += cluster.map_shared_rank(&row, rank)->values[threadIdx.x];
    sum += cluster.map_shared_rank(dynamic + threadIdx.x, rank)[0];
  }
  const auto token = cluster.barrier_arrive();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  static_cast<void>(token);
  cluster.barrier_wait();  // nobody leaves while others read its shared memory
}

void test_cluster() {
  const Shape shape{.grid = 8, .cluster = 4, .dynamic_shared = 32 * sizeof(int)};
  std::vector<int> out(8 * 32);
  CHECK(launch(shape, sum_of_cluster, out.data()) == cudaSuccess);
  for (int i = 0; i < 8 * 32; ++i) {
    CHECK(out[static_cast<std::size_t>(i)] == 4 * (i % 32) + 32 * (0 + 1 + 2 + 3) + 4);
  }
}

__global__ void sum_of_grid(int* partial, int* out, unsigned* flag) {
  const cg::grid_group grid = cg::this_grid();
  if (threadIdx.x == 0) partial[blockIdx.x] = static_cast<int>(blockIdx.x);
  grid.sync();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  grid.sync();
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  // All blocks of a cooperative launch run at once: one may wait for another.
  if (blockIdx.x == 0) {
    while (atomicAdd(flag, 0u) == 0) {
    }
  } else if (blockIdx.x == 1 && threadIdx.x == 0) {
    atomicExch(flag, 1u);
  }
  out[grid.thread_rank()] = sum;
}

void test_grid_barrier() {
  std::vector<int> partial(5), out(5 * 32);
  unsigned flag = 0;
  const Shape shape{.grid = 5, .cooperative = true};
  CHECK(launch(shape, sum_of_grid, partial.data(), out.data(), &flag) == cudaSuccess);
  CHECK(out == std::vector<int>(5 * 32, 10));
}

// The last block to finish adds what all have found.
__global__ void last_block_sums(float* partial, unsigned* arrived, float* out) {
  bool& is_last = block_shared<bool>();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<float>(blockIdx.x);
    __threadfence();
    is_last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  *out = sum;
}

void test_last_block() {
  std::vector<float> partial(9);
  unsigned arrived = 0;
  float out = 0;
  CHECK(launch(Shape{.grid = 9}, last_block_sums, partial.data(), &arrived, &out) == cudaSuccess);
  CHECK(out == 36.0f);
}

// ---- memory -------------------------------------------------------------------------------------

__global__ void copy_vectors(const uint4* x, uint4* y, const float4* a, float4* b) {
  __stcs(y + threadIdx.x, __ldcs(x + threadIdx.x));
  const float4 loaded = __ldg(a + threadIdx.x);
  __stwt(b + threadIdx.x, loaded);
  __stcg(&b[threadIdx.x].w, __ldcg(&a[threadIdx.x].x));
}

void test_vectors() {
  std::vector<uint4> x(32, make_uint4(1, 2, 3, 4)), y(32);
  std::vector<float4> a(32, make_float4(1, 2, 3, 4)), b(32);
  CHECK(launch(Shape{}, copy_vectors, x.data(), y.data(), a.data(), b.data()) == cudaSuccess);
  CHECK(y[31].w == 4);
  CHECK(b[31].z == 3.0f && b[31].w == 1.0f);
}

__global__ void first_bytes(float* out, __half* half, __nv_bfloat16* bfloat) {
  out[0] = block_shared<Row>().values[99] == -1 ? 1.0f : 0.0f;
  out[1] = dynamic_shared<float>()[7];
  *half = __float2half_rn(0.1f);
  *bfloat = __float2bfloat16_rn(0.1f);
}

void test_first_bytes_and_half() {
  float out[2] = {};
  __half half = {};
  __nv_bfloat16 bfloat = {};
  const Shape shape{.block = 1, .dynamic_shared = 32};
  CHECK(launch(shape, first_bytes, out, &half, &bfloat) == cudaSuccess);
  CHECK(out[0] == 1.0f && std::isnan(out[1]));
  CHECK(__half2float(half) == 0.0999755859375f);
  CHECK(__bfloat162float(bfloat) == 0.10009765625f);
}

void test_intrinsics() {
  CHECK(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu);
  CHECK(__umul64hi(~0ull, 16) == 15);
  CHECK(__popc(0xf0f0u) == 8 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31);
  CHECK(__brev(1u) == 0x80000000u && __brev(0x12345678u) == 0x1e6a2c48u);
  CHECK(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f);
  CHECK(rsqrtf(4.0f) == 0.5f && rsqrt(16.0) == 0.25 && __fdividef(1.0f, 4.0f) == 0.25f);
  CHECK(max(NAN, 1.0f) == 1.0f && min(1.0f, NAN) == 1.0f && max(3, 2) == 3);
}

// Launches from several threads of the operating system wait for each other.
void test_concurrent_launches() {
  std::vector<int> one(100), two(100);
  std::thread other(
      [&] { static_cast<void>(launch(Shape{.block = 100}, rotate, one.data(), 30)); });
  CHECK(launch(Shape{.block = 100}, rotate, two.data(), 30) == cudaSuccess);
  other.join();
  CHECK(one == two && one[0] == 30);
}

}  // namespace

int main() {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    emulation::set_seed(seed);
    test_shuffles();
    test_votes();
    test_block_barrier();
    test_cluster();
    test_grid_barrier();
    test_last_block();
    test_vectors();
    test_first_bytes_and_half();
    test_concurrent_launches();
  }
  test_every_thread_runs_once();
  test_intrinsics();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
