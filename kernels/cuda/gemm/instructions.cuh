// Instructions that products alone need: copies with a hint, turned fragments, and wgmma whose width is
// no power of two (PTX ISA 9.0).
#ifndef CACHALOT_KERNELS_CUDA_GEMM_INSTRUCTIONS_CUH_
#define CACHALOT_KERNELS_CUDA_GEMM_INSTRUCTIONS_CUH_

#include "kernels/cuda/ptx.cuh"

namespace cachalot {

// Of a weight that is read once a step: what else is in the second-level cache stays there.
__device__ __forceinline__ uint64_t StreamingPolicy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// CopyTile with a cache policy.
__device__ __forceinline__ void CopyTileHinted(uint32_t dst, const void* map, uint32_t barrier, int32_t x, int32_t y,
                                               int32_t z, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

// 8 x 8 of 16 bits over a warp: a lane gives columns 2 (l % 4) and the next of row l / 4, and gets rows of column l
// / 4.
__device__ __forceinline__ uint32_t Transpose8x8(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

#define CACHALOT_REGISTERS_48                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23," \
  " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44,"     \
  " %45, %46, %47"
#define CACHALOT_REGISTERS_96                                                                                  \
  CACHALOT_REGISTERS_48                                                                                        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68," \
  " %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89,"  \
  " %90, %91, %92, %93, %94, %95"
#define CACHALOT_OUTPUTS_8(i)                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CACHALOT_OUTPUTS_48(i)                                                                              \
  CACHALOT_OUTPUTS_8(i), CACHALOT_OUTPUTS_8(i + 8), CACHALOT_OUTPUTS_8(i + 16), CACHALOT_OUTPUTS_8(i + 24), \
      CACHALOT_OUTPUTS_8(i + 32), CACHALOT_OUTPUTS_8(i + 40)

template <>
__device__ __forceinline__ void WgmmaE4m3<96>(float (&d)[48], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 {" CACHALOT_REGISTERS_48 "}, %48, %49, p, 1, 1;\n}\n"
      : CACHALOT_OUTPUTS_48(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

template <>
__device__ __forceinline__ void WgmmaE4m3<192>(float (&d)[96], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {" CACHALOT_REGISTERS_96 "}, %96, %97, p, 1, 1;\n}\n"
      : CACHALOT_OUTPUTS_48(0), CACHALOT_OUTPUTS_48(48)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

#undef CACHALOT_REGISTERS_48
#undef CACHALOT_REGISTERS_96
#undef CACHALOT_OUTPUTS_8
#undef CACHALOT_OUTPUTS_48

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_GEMM_INSTRUCTIONS_CUH_
