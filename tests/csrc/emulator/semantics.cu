// What the built-in functions and instructions do, computed a second time the plain way. The same program compiles with
// nvcc: on a GPU it says whether the emulator's idea of an instruction is the hardware's.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace {

template <class T>
struct Buffer {
  T* device;
  std::vector<T> host;

  explicit Buffer(size_t n, T value = T{}) : host(n, value) {
    cudaMalloc(&device, n * sizeof(T));
    upload();
  }
  void upload() { cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice); }
  void download() { cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost); }
};

int failures = 0;

void report(const char* name, bool right) {
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error != cudaSuccess) printf("%s: %s\n", name, cudaGetErrorString(error));
  if (!right) printf("%s: wrong\n", name);
  failures += !right || error != cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Warps
// ---------------------------------------------------------------------------------------------------------------------

constexpr unsigned kAll = 0xffffffffu;

__global__ void __launch_bounds__(32) shuffles(int* out) {
  const int lane = threadIdx.x, v = 100 + lane;
  int* mine = out + lane * 10;
  mine[0] = __shfl_sync(kAll, v, 5);
  mine[1] = __shfl_sync(kAll, v, 3, 8);
  mine[2] = __shfl_up_sync(kAll, v, 2, 16);
  mine[3] = __shfl_down_sync(kAll, v, 3, 8);
  mine[4] = __shfl_xor_sync(kAll, v, 16);
  mine[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  mine[6] = __any_sync(kAll, lane == 31) + 2 * __all_sync(kAll, lane < 31) + 4 * __all_sync(kAll, lane < 32);
  mine[7] = static_cast<int>(__reduce_add_sync(kAll, lane));
  // Half a warp on its own: the other half is elsewhere.
  mine[8] = lane < 16 ? __shfl_xor_sync(0x0000ffffu, v, 1) : __shfl_xor_sync(0xffff0000u, v, 2);
  mine[9] = static_cast<int>(__match_any_sync(kAll, lane / 8));
}

void test_shuffles() {
  Buffer<int> out(320);
  shuffles<<<1, 32>>>(out.device);
  out.download();
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    const int expected[10] = {105,
                              100 + lane / 8 * 8 + 3,
                              100 + (lane % 16 < 2 ? lane : lane - 2),
                              100 + (lane % 8 + 3 >= 8 ? lane : lane + 3),
                              100 + (lane ^ 16),
                              0x49249249,
                              1 + 4,
                              496,
                              100 + (lane < 16 ? lane ^ 1 : lane ^ 2),
                              0xff << lane / 8 * 8};
    right = right && memcmp(expected, &out.host[lane * 10], sizeof expected) == 0;
  }
  report("shuffles", right);
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks
// ---------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(96) block_wide(int* out) {
  __shared__ int values[96];
  const int t = threadIdx.x;
  out[t * 4] = __syncthreads_count(t % 4 == 0);
  out[t * 4 + 1] = __syncthreads_or(t == 95) + 2 * __syncthreads_and(t != 95);
  // The first two warps meet at a barrier of their own.
  values[t] = t;
  if (t < 64) asm volatile("bar.sync 1, 64;" ::: "memory");
  out[t * 4 + 2] = t < 64 ? values[63 - t] : -1;
  out[t * 4 + 3] = static_cast<int>(blockDim.x * gridDim.x + blockIdx.x);
}

void test_block_wide() {
  Buffer<int> out(96 * 4);
  block_wide<<<1, 96>>>(out.device);
  out.download();
  bool right = true;
  for (int t = 0; t < 96; ++t) {
    const int expected[4] = {24, 1, t < 64 ? 63 - t : -1, 96};
    right = right && memcmp(expected, &out.host[t * 4], sizeof expected) == 0;
  }
  report("block-wide votes and named barriers", right);
}

__global__ void __launch_bounds__(64) atomics(int* sum, unsigned* maximum, int* swapped) {
  atomicAdd(sum, 3);
  atomicMax(maximum, threadIdx.x + 64 * blockIdx.x);
  if (atomicCAS(swapped, 0, 7) == 0) atomicAdd(swapped, 1);
}

void test_atomics() {
  Buffer<int> sum(1), swapped(1);
  Buffer<unsigned> maximum(1);
  atomics<<<3, 64>>>(sum.device, maximum.device, swapped.device);
  sum.download();
  maximum.download();
  swapped.download();
  report("atomics", sum.host[0] == 576 && maximum.host[0] == 191 && swapped.host[0] == 8);
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies
// ---------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(32) copies(const float* in, float* out) {
  extern __shared__ __align__(16) float shared[];
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared + 4 * threadIdx.x));
  const int bytes = threadIdx.x % 4 * 4;  // the rest of the 16 becomes zero
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(in + 4 * threadIdx.x), "r"(bytes)
               : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  for (int i = threadIdx.x; i < 128; i += 32) out[i] = shared[i];
}

void test_copies() {
  Buffer<float> in(128), out(128);
  for (int i = 0; i < 128; ++i) in.host[i] = static_cast<float>(i + 1);
  in.upload();
  copies<<<1, 32, 512>>>(in.device, out.device);
  out.download();
  bool right = true;
  for (int i = 0; i < 128; ++i) right = right && out.host[i] == (i % 4 < i / 4 % 4 ? in.host[i] : 0.f);
  report("cp.async with zeros", right);
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrices
// ---------------------------------------------------------------------------------------------------------------------

// 16x16 values; what every lane gets from ldmatrix, plain and transposed.
__global__ void __launch_bounds__(32) load_matrices(const uint16_t* in, uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[16][24];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i / 16][i % 16] = in[i];
  __syncwarp();
  // Matrices in the order in which mma reads A: the upper left, the lower left, the upper right, the lower right.
  const unsigned row = static_cast<unsigned>(__cvta_generic_to_shared(&tile[lane % 16][lane / 16 * 8]));
  uint32_t* mine = out + lane * 11;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(mine[0]), "=r"(mine[1]), "=r"(mine[2]), "=r"(mine[3])
               : "r"(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(mine[4]), "=r"(mine[5]), "=r"(mine[6]), "=r"(mine[7])
               : "r"(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(mine[8]), "=r"(mine[9])
               : "r"(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(mine[10]) : "r"(row));
}

void test_load_matrices() {
  Buffer<uint16_t> in(256);
  Buffer<uint32_t> out(32 * 11);
  for (int i = 0; i < 256; ++i) in.host[i] = static_cast<uint16_t>(i * 7);
  in.upload();
  load_matrices<<<1, 32>>>(in.device, out.device);
  out.download();
  const auto at = [&](int matrix, int r, int c) -> uint32_t {
    return in.host[(r + matrix % 2 * 8) * 16 + c + matrix / 2 * 8];
  };
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, c = lane % 4 * 2;
    uint32_t expected[11];
    for (int m = 0; m < 4; ++m) {
      expected[m] = at(m, g, c) | at(m, g, c + 1) << 16;
      expected[4 + m] = at(m, c, g) | at(m, c + 1, g) << 16;
    }
    expected[8] = expected[4];
    expected[9] = expected[5];
    expected[10] = expected[0];
    right = right && memcmp(expected, &out.host[lane * 11], sizeof expected) == 0;
  }
  report("ldmatrix", right);
}

struct BFloat16 {
  static constexpr int kDepth = 16;
  using T = __nv_bfloat16;
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct Half {
  static constexpr int kDepth = 16;
  using T = __half;
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct TensorFloat {
  static constexpr int kDepth = 8;
  using T = float;
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

// d += a b with a [16, depth] and b [8, depth]; fragments by the definition of the PTX manual.
template <class M>
__global__ void __launch_bounds__(32) products(const typename M::T* a, const typename M::T* b, float* d) {
  constexpr int kPer = 4 / sizeof(typename M::T), kDepth = M::kDepth;
  const int lane = threadIdx.x, g = lane / 4, place = lane % 4 * kPer;
  uint32_t fa[4], fb[2];
  const auto word = [](const typename M::T* p) { return *reinterpret_cast<const uint32_t*>(p); };
  for (int w = 0; w < 4; ++w) fa[w] = word(a + (g + w % 2 * 8) * kDepth + place + w / 2 * 4 * kPer);
  for (int w = 0; w < 2; ++w) fb[w] = word(b + g * kDepth + place + w * 4 * kPer);
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = d[(g + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  M::multiply(c, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

template <class M>
void test_products(const char* name) {
  constexpr int kDepth = M::kDepth;
  Buffer<typename M::T> a(16 * kDepth), b(8 * kDepth);
  Buffer<float> d(128);
  const auto value = [](int i) { return static_cast<float>((i * 37) % 17 - 8) / 8.f; };  // exact in every type
  for (int i = 0; i < 16 * kDepth; ++i) a.host[i] = static_cast<typename M::T>(value(i));
  for (int i = 0; i < 8 * kDepth; ++i) b.host[i] = static_cast<typename M::T>(value(i + 5));
  for (int i = 0; i < 128; ++i) d.host[i] = value(3 * i);
  std::vector<float> expected = d.host;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c)
      for (int k = 0; k < kDepth; ++k) expected[r * 8 + c] += value(r * kDepth + k) * value(c * kDepth + k + 5);
  a.upload();
  b.upload();
  d.upload();
  products<M><<<1, 32>>>(a.device, b.device, d.device);
  d.download();
  report(name, d.host == expected);
}

// Conversions that round to nearest even, at ties too.
__global__ void __launch_bounds__(32) conversions(const float* in, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    out[2 * i] = __bfloat162float(__float2bfloat16_rn(in[i]));
    out[2 * i + 1] = __half2float(__float2half_rn(in[i]));
  }
}

void test_conversions() {
  Buffer<float> in(7);
  const float values[7] = {1.00390625f, 1.01171875f, -3.1415927f, 65520.f, 1e-7f, 3e38f, 0.f};
  const float expected[14] = {1.0f,
                              1.00390625f,
                              1.015625f,
                              1.01171875f,
                              -3.140625f,
                              -3.140625f,
                              65536.0f,
                              INFINITY,
                              1.0011717677116394e-07f,
                              1.1920928955078125e-07f,
                              3.00405527047391e+38f,
                              INFINITY,
                              0.0f,
                              0.0f};
  in.host.assign(values, values + 7);
  in.upload();
  Buffer<float> out(14);
  conversions<<<1, 32>>>(in.device, out.device, 7);
  out.download();
  report("conversions", memcmp(expected, out.host.data(), sizeof expected) == 0);
}

}  // namespace

int main() {
  test_shuffles();
  test_block_wide();
  test_atomics();
  test_copies();
  test_load_matrices();
  test_products<BFloat16>("mma bf16");
  test_products<Half>("mma f16");
  test_products<TensorFloat>("mma tf32");
  test_conversions();
  printf(failures ? "FAILED\n" : "OK\n");
  return failures != 0;
}
