// Copies from global to shared memory that need no register and do not wait (sm_80 and later). Where the host's compiler builds the file for
// tests they land at the wait at the latest.
#pragma once

#include "cuda.cuh"

/// Begins to copy a word of 4, 8 or 16 bytes, or as many zeros if it is not there. Nobody reads `to` before this thread has waited. Words of
/// 2 bytes are copied at once: the hardware has no such copy.
template <class Word> __device__ __forceinline__ void copy_async(Word *to, const Word *from, bool is_there = true) {
    constexpr int BYTES = sizeof(Word);
    if constexpr (BYTES < 4) {
        *to = is_there ? *from : Word{};
    } else {
#ifdef __CUDACC__
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        const int bytes = is_there ? BYTES : 0;
        if constexpr (BYTES == 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
#else
        sim::begin_copy(to, from, BYTES, is_there ? BYTES : 0);
#endif
    }
}

/// Makes a group of the copies that this thread has begun since the last one.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    sim::commit_copies();
#endif
}

/// Waits for this thread's groups of copies but the last LEFT; what others have copied is there after a barrier.
template <int LEFT> __device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#else
    sim::wait_for_copies(LEFT);
#endif
}

/// Waits for all copies that this thread has begun, likewise.
__device__ __forceinline__ void wait_for_copies() {
    commit_copies();
    wait_for_copies<0>();
}
