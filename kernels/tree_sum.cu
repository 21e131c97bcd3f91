// Parts of a sum over ranks, added up along the binary tree over their numbers, ((0+1)+(2+3))+((4+5)+(6+7)) (src/collective/tree.rs): a
// block adds up to eight neighbours into the first of them. Where there are more parts, launches after the first one do the same with
// those sums. `count` parts of n elements stand `stride` elements apart, at multiples of 16 bytes. The bits are the CPU's. Moves 4 n bytes
// for each part, and 4 n for each sum.

#include "pack.cuh"

namespace {

constexpr int THREADS = 256;
/// Parts that a block adds up.
constexpr uint32_t PARTS = 8;

/// The sum of the first `count` values; what is beyond is not looked at.
__device__ __forceinline__ float sum_along_tree(float (&values)[PARTS], uint32_t count) {
#pragma unroll
    for (uint32_t apart = 1; apart < PARTS; apart *= 2)
#pragma unroll
        for (uint32_t i = 0; i < PARTS; i += 2 * apart)
            if (i + apart < count)
                values[i] = __fadd_rn(values[i], values[i + apart]);
    return values[0];
}

} // namespace

KERNEL(THREADS, tree_sum, float *parts, uint32_t count, uint64_t stride, uint64_t n) {
    constexpr int SIZE = Pack<float>::SIZE;
    const uint32_t first = PARTS * blockIdx.y, here = count - first < PARTS ? count - first : PARTS;
    const uint64_t begin = SIZE * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    float *at = parts + first * stride;
    float values[PARTS];
    if (begin + SIZE <= n) {
        Pack<float> packs[PARTS], sum;
#pragma unroll
        for (uint32_t p = 0; p < PARTS; p++)
            if (p < here)
                packs[p] = Pack<float>::load(at + p * stride + begin);
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
#pragma unroll
            for (uint32_t p = 0; p < PARTS; p++)
                values[p] = p < here ? packs[p].values[i] : 0;
            sum.values[i] = sum_along_tree(values, here);
        }
        sum.store(at + begin);
    } else {
        for (uint64_t i = begin; i < n; i++) {
#pragma unroll
            for (uint32_t p = 0; p < PARTS; p++)
                values[p] = p < here ? at[p * stride + i] : 0;
            at[i] = sum_along_tree(values, here);
        }
    }
}
