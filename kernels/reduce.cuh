// Sums over the threads of a warp or a block, in an order that depends on their number alone.
#pragma once

#include "cuda.cuh"

/// The sum of `value` over all lanes of a warp, at every one of them.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2)
        value += __shfl_xor_sync(~0u, value, bits);
    return value;
}

/// The sum of `value` over all threads of the block, at every one of them. The block has whole warps, at most 32, and all of its threads
/// come here.
template <class T, int THREADS> __device__ __forceinline__ T block_sum(T value) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024);
    constexpr int WARPS = THREADS / 32;
    SHARED(T, of_warp, WARPS);
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    T sum = of_warp[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; warp++)
        sum += of_warp[warp];
    // The next sum writes the same array.
    __syncthreads();
    return sum;
}
