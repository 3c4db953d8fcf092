// Ceilings and random data on the GPU.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "tests/bench/cuda_ceilings.h"

namespace cachalot::bench {
namespace {

void Must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

void Must(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "cuBLASLt: %s\n", cublasLtGetStatusString(status));
  std::exit(1);
}

__device__ uint32_t Hash(uint64_t x, uint32_t seed) {
  uint64_t z = (x + 1) * 0x9E3779B97F4A7C15ull + seed * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}

// Mean 0, variance 1: a sum of four uniform numbers.
__device__ float Normal(uint64_t x, uint32_t seed) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<float>(Hash(4 * x + i, seed)) * 0x1p-32f - 0.5f;
  return sum * 1.7320508f;
}

__global__ void FillNormal(__nv_bfloat16* data, int64_t count, uint32_t seed, float deviation) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    data[i] = __float2bfloat16(Normal(i, seed) * deviation);
  }
}

__global__ void FillEntries(uint8_t* data, int64_t entries, uint32_t seed) {
  for (int64_t e = blockIdx.x; e < entries; e += gridDim.x) {
    uint8_t* entry = data + e * 656;
    for (int i = threadIdx.x; i < 576; i += blockDim.x) {
      const float value = Normal(e * 576 + i, seed);
      if (i < 512) {
        entry[i] = __nv_cvt_float_to_fp8(value * 100, __NV_SATFINITE, __NV_E4M3);
      } else {
        reinterpret_cast<__nv_bfloat16*>(entry + 528)[i - 512] = __float2bfloat16(value);
      }
    }
    if (threadIdx.x < 4) reinterpret_cast<float*>(entry + 512)[threadIdx.x] = 0.01f;
  }
}

__global__ void Read(const uint4* data, int64_t count, uint4* sink) {
  uint4 sum = make_uint4(0, 0, 0, 0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 loaded[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) loaded[k] = __ldg(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      sum = make_uint4(sum.x ^ loaded[k].x, sum.y ^ loaded[k].y, sum.z ^ loaded[k].z, sum.w ^ loaded[k].w);
  }
  if ((sum.x & sum.y & sum.z & sum.w) == 0x12345678) *sink = sum;  // never, but the compiler cannot know
}

double MedianSeconds(const std::function<void()>& run) {
  cudaEvent_t begin, end;
  Must(cudaEventCreate(&begin));
  Must(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 13; ++i) {
    Must(cudaEventRecord(begin));
    run();
    Must(cudaEventRecord(end));
    Must(cudaEventSynchronize(end));
    float ms = 0;
    Must(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] / 1e3;
}

double ReadCeiling() {
  constexpr int64_t kBytes = int64_t{8} << 30;
  void* data = nullptr;
  Must(cudaMalloc(&data, kBytes));
  FillNormalBf16(data, kBytes / 2, 1, 1.0f);
  const double seconds = MedianSeconds(
      [&] { Read<<<132 * 16, 512>>>(static_cast<const uint4*>(data), kBytes / 16, static_cast<uint4*>(data)); });
  Must(cudaFree(data));
  return kBytes / seconds;
}

double ProductCeiling() {
  constexpr int64_t n = 8192;
  void* data[3];
  for (int i = 0; i < 3; ++i) {
    Must(cudaMalloc(&data[i], n * n * 2));
    FillNormalBf16(data[i], n * n, 2 + i, 1.0f);
  }
  void* workspace = nullptr;
  size_t workspace_bytes = size_t{64} << 20;
  Must(cudaMalloc(&workspace, workspace_bytes));
  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t operation;
  cublasLtMatrixLayout_t layout;
  cublasLtMatmulPreference_t preference;
  Must(cublasLtCreate(&handle));
  Must(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  Must(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)));
  Must(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, n, n, n));
  Must(cublasLtMatmulPreferenceCreate(&preference));
  Must(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                                            sizeof(workspace_bytes)));
  cublasLtMatmulHeuristicResult_t best;
  int found = 0;
  Must(cublasLtMatmulAlgoGetHeuristic(handle, operation, layout, layout, layout, layout, preference, 1, &best, &found));
  const float one = 1, zero = 0;
  const double seconds = MedianSeconds([&] {
    Must(cublasLtMatmul(handle, operation, &one, data[0], layout, data[1], layout, &zero, data[2], layout, data[2],
                        layout, &best.algo, workspace, workspace_bytes, nullptr));
  });
  for (void* p : data) Must(cudaFree(p));
  Must(cudaFree(workspace));
  return 2.0 * n * n * n / seconds;
}

}  // namespace

std::string GpuName() {
  cudaDeviceProp properties;
  int driver = 0;
  Must(cudaGetDeviceProperties(&properties, 0));
  Must(cudaDriverGetVersion(&driver));
  return std::string(properties.name) + ", driver for CUDA " + std::to_string(driver / 1000) + "." +
         std::to_string(driver % 1000 / 10);
}

Ceilings MeasureCeilings() { return {ReadCeiling(), ProductCeiling()}; }

void FillNormalBf16(void* data, int64_t count, uint32_t seed, float deviation) {
  FillNormal<<<132 * 8, 256>>>(static_cast<__nv_bfloat16*>(data), count, seed, deviation);
  Must(cudaDeviceSynchronize());
}

void FillFp8Entries(void* data, int64_t entries, uint32_t seed) {
  FillEntries<<<132 * 16, 128>>>(static_cast<uint8_t*>(data), entries, seed);
  Must(cudaDeviceSynchronize());
}

}  // namespace cachalot::bench
