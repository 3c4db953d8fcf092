// Kernels of what drafting starts from, a block a row; and of its rows, a thread each.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/drafts_kernels.h"

namespace cachalot {
namespace {

constexpr int kRowThreads = 128;

template <typename Word>
__device__ void CopyWords(char* dst, const char* src, int32_t bytes) {
  for (int i = threadIdx.x; i < bytes / static_cast<int>(sizeof(Word)); i += kRowThreads) {
    reinterpret_cast<Word*>(dst)[i] = src == nullptr ? Word{} : reinterpret_cast<const Word*>(src)[i];
  }
}

// Null: zeros.
__device__ void CopyBytes(char* dst, const char* src, const RowCopy& copy) {
  if (copy.word == 16) {
    CopyWords<uint4>(dst, src, copy.bytes);
  } else if (copy.word == 4) {
    CopyWords<uint32_t>(dst, src, copy.bytes);
  } else {
    CopyWords<char>(dst, src, copy.bytes);
  }
}

__device__ int64_t BlockOf(const BorderArgs& a, int32_t slot, int32_t position) {
  return a.block_table[slot * a.table_stride + position / kPageTokens];
}

__global__ void __launch_bounds__(kRowThreads) PreviousHiddenKernel(BorderArgs a, RowCopy hidden, RowCopy borders) {
  const int64_t t = blockIdx.x;
  const int32_t slot = a.slots[t], position = a.positions[t];
  char* dst = borders.dst + t * borders.dst_stride;
  if (slot < 0 || position == 0) {
    CopyBytes(dst, nullptr, borders);
  } else if (t > 0 && a.slots[t - 1] == slot) {
    CopyBytes(dst, hidden.src + (t - 1) * hidden.src_stride, hidden);
  } else {
    CopyBytes(dst, borders.src + BlockOf(a, slot, position - 1) * borders.src_stride, borders);
  }
}

__global__ void __launch_bounds__(kRowThreads) KeepBordersKernel(BorderArgs a, RowCopy borders) {
  const int64_t t = blockIdx.x;
  const int32_t slot = a.slots[t];
  if (slot < 0) return;
  const int32_t length = a.length[slot], next = a.positions[t] + 1;
  if (next > length || (next < length && next % kPageTokens != 0)) return;
  CopyBytes(borders.dst + BlockOf(a, slot, next - 1) * borders.dst_stride, borders.src + t * borders.src_stride,
            borders);
}

__global__ void __launch_bounds__(kRowThreads) BeginDraftsKernel(BeginDraftsArgs a) {
  const int32_t s = static_cast<int32_t>(blockIdx.x * kRowThreads + threadIdx.x);
  if (s == 0) a.query_start[a.num_sequences] = a.num_sequences;
  if (s >= a.num_sequences) return;
  const int32_t slot = a.num_accepted[s] > 0 ? a.step_slot[s] : -1;
  a.slots[s] = a.seq_slot[s] = slot;
  a.tokens[s] = slot < 0 ? 0 : a.last_token[slot];
  a.positions[s] = slot < 0 ? 0 : a.length[slot];
  a.seq_start[s] = a.row_target[s] = -1;
  a.query_start[s] = a.row_seq[s] = s;
  a.row_token[s] = slot < 0 ? -1 : s;
}

__global__ void __launch_bounds__(kRowThreads) TakeDraftsKernel(TakeDraftsArgs a) {
  const int32_t s = static_cast<int32_t>(blockIdx.x * kRowThreads + threadIdx.x);
  if (s >= a.num_rows) return;
  const int32_t slot = a.slots[s], token = slot < 0 ? 0 : a.drawn[s];
  a.proposed[s * a.proposed_stride + a.index] = token;
  if (slot < 0) return;
  a.drafts[slot * a.drafts_stride + a.index] = token;
  a.tokens[s] = token;
  ++a.positions[s];
}

unsigned BlocksOf(int32_t num_rows) { return static_cast<unsigned>((num_rows + kRowThreads - 1) / kRowThreads); }

}  // namespace

void LaunchBeginDrafts(cudaStream_t stream, const BeginDraftsArgs& args) {
  BeginDraftsKernel<<<BlocksOf(args.num_sequences), kRowThreads, 0, stream>>>(args);
}

void LaunchTakeDrafts(cudaStream_t stream, const TakeDraftsArgs& args) {
  TakeDraftsKernel<<<BlocksOf(args.num_rows), kRowThreads, 0, stream>>>(args);
}

void LaunchPreviousHidden(cudaStream_t stream, const BorderArgs& args, const RowCopy& hidden, const RowCopy& borders,
                          int64_t num_rows) {
  PreviousHiddenKernel<<<static_cast<unsigned>(num_rows), kRowThreads, 0, stream>>>(args, hidden, borders);
}

void LaunchKeepBorders(cudaStream_t stream, const BorderArgs& args, const RowCopy& borders, int64_t num_rows) {
  KeepBordersKernel<<<static_cast<unsigned>(num_rows), kRowThreads, 0, stream>>>(args, borders);
}

}  // namespace cachalot
