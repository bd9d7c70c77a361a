// Accesses whose cost is known: what the emulator counts must be that.
#include <cuda_runtime.h>
#include <stdio.h>

extern "C" void emu_count_traffic(int on);
extern "C" const char* emu_traffic();

__global__ void __launch_bounds__(32) accesses(const float* in, float* out) {
  __shared__ float tile[32 * 33];
  const int lane = threadIdx.x;
  const float near = in[lane];                                    // 4 sectors of 4
  const float far = in[8 * lane];                                 // 32 sectors of 4
  const float4 wide = reinterpret_cast<const float4*>(in)[lane];  // 16 sectors of 16
  tile[lane] = near;                                              // 1 pass
  tile[32 * lane] = far;                                          // 32 passes
  __syncwarp();
  out[lane] = tile[33 * lane % 32] + wide.x + wide.y + wide.z + wide.w;
}

int main() {
  float *in, *out;
  cudaMalloc(&in, 256 * sizeof(float));
  cudaMalloc(&out, 32 * sizeof(float));
  cudaMemset(in, 0, 256 * sizeof(float));
  emu_count_traffic(1);
  accesses<<<1, 32>>>(in, out);
  printf("%s\n%s", cudaGetErrorString(cudaGetLastError()), emu_traffic());
}
