// y = x in the other precision, to the nearest, n elements of any shape: buffers aligned to 16 bytes. Moves 6 n bytes.

#include "pack.cuh"

namespace {

constexpr int THREADS = 256;
/// Elements of a thread.
constexpr int SIZE = Pack<bf16>::SIZE;

/// Reads or writes SIZE elements, 16 bytes at a time.
template <class T> __device__ __forceinline__ void load(const T *from, float *values) {
#pragma unroll
    for (int first = 0; first < SIZE; first += Pack<T>::SIZE) {
        const Pack<T> pack = Pack<T>::load(from + first);
#pragma unroll
        for (int i = 0; i < Pack<T>::SIZE; i++)
            values[first + i] = pack.values[i];
    }
}

template <class T> __device__ __forceinline__ void store(T *to, const float *values) {
#pragma unroll
    for (int first = 0; first < SIZE; first += Pack<T>::SIZE) {
        Pack<T> pack;
#pragma unroll
        for (int i = 0; i < Pack<T>::SIZE; i++)
            pack.values[i] = values[first + i];
        pack.store(to + first);
    }
}

template <class From, class To> __device__ __forceinline__ void cast(const From *x, To *y, uint64_t n) {
    const uint64_t first = SIZE * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (first + SIZE <= n) {
        float values[SIZE];
        load(x + first, values);
        store(y + first, values);
    } else {
        for (uint64_t i = first; i < n; i++)
            y[i] = rounded<To>(widened(x[i]));
    }
}

} // namespace

KERNEL(THREADS, cast_to_bf16, const float *x, bf16 *y, uint64_t n) { cast(x, y, n); }

KERNEL(THREADS, cast_to_f32, const bf16 *x, float *y, uint64_t n) { cast(x, y, n); }
