// What every kernel begins with: CUDA's words, or their twins where the host's compiler builds the same file for tests (tests/cuda-sim).
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <stdint.h>

/// A kernel for blocks of at most so many threads, called by its name.
#define KERNEL(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
/// Likewise; a multiprocessor has registers for so many blocks at a time.
#define RESIDENT_KERNEL(threads, blocks, name, ...) extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
/// An array that the threads of a block share, aligned for 16-byte accesses. Its content is undefined until they write it.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
/// The bytes that the launch adds to them, likewise; 16 divides the address.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

/// By a clock of the GPU's own.
__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

#else
#include "cuda_sim.h"

using sim::nanoseconds;

#define KERNEL(threads, name, ...)                                                                                                         \
    extern "C" void name(__VA_ARGS__);                                                                                                     \
    static const bool name##_is_known = sim::kernels().emplace(#name, sim::describe<name>(threads, name)).second;                          \
    extern "C" void name(__VA_ARGS__)
#define RESIDENT_KERNEL(threads, blocks, name, ...) KERNEL(threads, name, __VA_ARGS__)
#define SHARED(type, name, count)                                                                                                          \
    static const char name##_tag = 0;                                                                                                      \
    auto &name = *static_cast<type(*)[count]>(sim::shared(&name##_tag, sizeof(type[count])))
#define DYNAMIC_SHARED(name) unsigned char *const name = static_cast<unsigned char *>(sim::dynamic_shared())
#endif
