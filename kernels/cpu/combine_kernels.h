// The weighted sum of a token's expert results.
#ifndef CACHALOT_KERNELS_CPU_COMBINE_KERNELS_H_
#define CACHALOT_KERNELS_CPU_COMBINE_KERNELS_H_

#include "kernels/cpu/thread_pool.h"
#include "kernels/tensor.h"

namespace cachalot {

// out[t] <- shared[t] (zeros when empty) + sum over k, in order and in fp32, of weights[k] * y[rows[k]], rows[k] >= 0.
void CombineRow(const Tensor& out, const Tensor& y, const float* weights, const int32_t* rows, int64_t num_choices,
                const Tensor& shared, int64_t t);

// Likewise every row of out [T, D]; weights [T, K], rows [T, K].
void CombineRows(const Tensor& out, const Tensor& y, const Tensor& weights, const int32_t* rows, const Tensor& shared,
                 ThreadPool* pool);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_COMBINE_KERNELS_H_
