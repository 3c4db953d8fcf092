// What the kernels of long prefill chunks share: the chunks' list, instructions of their own, stores of products.
#ifndef CACHALOT_KERNELS_CUDA_PREFILL_PLAN_CUH_
#define CACHALOT_KERNELS_CUDA_PREFILL_PLAN_CUH_

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/prefill_attention_kernels.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace cachalot {
namespace {

constexpr int kQueryTile = 128;
constexpr int kBoxBytes = 128 * 128;  // 128 rows of 64 bf16

struct Chunk {
  int32_t first_row, num_rows, slot;
  int32_t num_keys;    // that its last row sees
  int32_t first_tile;  // of its keys, among those of all chunks
};

struct PrefillPlan {
  int32_t num_chunks, num_tiles;
  int32_t next_item;  // of the pass
  int32_t unused;
  Chunk chunks[];
};

__device__ __forceinline__ int32_t NumKeyTiles(int32_t num_keys) {
  return (num_keys + kPrefillKeyTile - 1) / kPrefillKeyTile;
}

// A warpgroup's arrival at a barrier that another one waits for with SyncThreads.
__device__ __forceinline__ void ArriveThreads(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// d [64,128] += a [64,16] * b [16,128], a in registers: as WgmmaBf16Transposed<128> has it, packed, the columns 8 j + 2
// (t % 4) of j = 0 and 1.
__device__ __forceinline__ void WgmmaRegisters(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

// Of a product's row [128] in bf16 a thread has columns 8 j + 2 (lane % 4) + {0, 1} in word j. Four neighbouring lanes
// change words, so that this one has columns 32 g + 8 (lane % 4) + {0..7} in words 4 g .. 4 g + 3.
__device__ __forceinline__ void GatherColumns(uint32_t (&w)[16]) {
  const int lane = threadIdx.x % 4;
  const bool is_odd = lane & 1, is_high = lane & 2;
#pragma unroll
  for (int g = 0; g < 16; g += 4) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {  // words k and k + 1 with the neighbour
      const uint32_t mine = is_odd ? w[g + k + 1] : w[g + k], other = is_odd ? w[g + k] : w[g + k + 1];
      const uint32_t taken = __shfl_xor_sync(0xffffffffu, other, 1);
      w[g + k] = is_odd ? taken : mine;
      w[g + k + 1] = is_odd ? mine : taken;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // words k and k + 2 with the one after
      const uint32_t mine = is_high ? w[g + k + 2] : w[g + k], other = is_high ? w[g + k] : w[g + k + 2];
      const uint32_t taken = __shfl_xor_sync(0xffffffffu, other, 2);
      w[g + k] = is_high ? taken : mine;
      w[g + k + 2] = is_high ? mine : taken;
    }
  }
}

}  // namespace
}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_PREFILL_PLAN_CUH_
