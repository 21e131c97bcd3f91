// One thread for 16 bytes of a tensor, whatever its shape.
#pragma once

#include "pack.cuh"

/// Threads of a block.
constexpr int ELEMENTWISE_THREADS = 256;

/// Gives `each` the neighbours of this thread, read from `inputs` as f32, and writes what it returns to `output` (which it may also read, as
/// its last argument, if `adds`). `n` elements; the last thread may have fewer than a pack.
template <class T, class F, class... Inputs>
__device__ __forceinline__ void elementwise(uint64_t n, T *output, bool adds, F each, const Inputs *...inputs) {
    constexpr int SIZE = Pack<T>::SIZE;
    const uint64_t first = SIZE * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (first + SIZE <= n) {
        Pack<T> result = adds ? Pack<T>::load(output + first) : Pack<T>{};
        auto apply = [&](const auto &...packs) {
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                float value = each(packs.values[i]...);
                result.values[i] = adds ? __fadd_rn(result.values[i], value) : value;
            }
        };
        apply(Pack<T>::load(inputs + first)...);
        result.store(output + first);
    } else {
        for (uint64_t i = first; i < n; i++) {
            float value = each(widened(inputs[i])...);
            output[i] = rounded<T>(adds ? __fadd_rn(widened(output[i]), value) : value);
        }
    }
}
