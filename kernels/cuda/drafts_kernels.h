// Launches of what only an MTP layer needs.
#ifndef CACHALOT_KERNELS_CUDA_DRAFTS_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_DRAFTS_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/row_copy.h"

namespace cachalot {

// Rows and where the borders of their sequences' blocks are.
struct BorderArgs {
  const int32_t* positions;    // [T]
  const int32_t* slots;        // [T]
  const int32_t* block_table;  // [U, table_stride]
  int64_t table_stride;
  const int32_t* length;  // [U]
};

// Row t <- row t - 1 of `hidden`, or a row of `borders`, or zeros. The copies share their destination.
void LaunchPreviousHidden(cudaStream_t stream, const BorderArgs& args, const RowCopy& hidden, const RowCopy& borders,
                          int64_t num_rows);

// Rows of `borders` <- those rows that a border is to be kept of.
void LaunchKeepBorders(cudaStream_t stream, const BorderArgs& args, const RowCopy& borders, int64_t num_rows);

// One row a sequence: the slot's last token where it has sampled, padding elsewhere; and what verbs need of such rows.
struct BeginDraftsArgs {
  int32_t *tokens, *positions, *slots;                                             // [S]
  int32_t *seq_slot, *seq_start, *query_start, *row_token, *row_seq, *row_target;  // [S], query_start [S+1]
  const int32_t* step_slot;                                                        // [S] of the step's sequences
  const int32_t* num_accepted;                                                     // [S]
  const int32_t *last_token, *length;                                              // [U]
  int32_t num_sequences;
};
void LaunchBeginDrafts(cudaStream_t stream, const BeginDraftsArgs& args);

// What was drawn becomes draft `index` of every row and the row's token, one position on.
struct TakeDraftsArgs {
  const int32_t* drawn;         // [S]
  int32_t* proposed;            // [S, proposed_stride]
  int32_t* drafts;              // [U, drafts_stride]
  int32_t *tokens, *positions;  // [S]
  const int32_t* slots;         // [S]
  int64_t proposed_stride, drafts_stride;
  int32_t index, num_rows;
};
void LaunchTakeDrafts(cudaStream_t stream, const TakeDraftsArgs& args);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_DRAFTS_KERNELS_H_
