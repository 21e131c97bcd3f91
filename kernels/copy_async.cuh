// Copies from global to shared memory that need no register and do not wait (sm_80 and later).
#pragma once

#include "cuda.cuh"

/// Begins to copy a word. Nobody reads `to` before this thread has waited. Words of 2 bytes are copied at once: the hardware has no such copy.
template <class Word> __device__ __forceinline__ void copy_async(Word *to, const Word *from) {
#ifdef __CUDACC__
    if constexpr (sizeof(Word) >= 4) {
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        if constexpr (sizeof(Word) == 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(sizeof(Word)) : "memory");
        return;
    }
#endif
    *to = *from;
}

/// Waits for all copies that this thread has begun; what others have copied is there after a barrier.
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
