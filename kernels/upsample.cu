// Twice the height and width by the nearest pixel, and its gradient, the sum of the four (src/ops/upsample).
//
//   x, dx   T [N, H, W, C]
//   y, dy   T [N, 2H, 2W, C]
//
// Forward y =, backward dx (+)=. A thread has a pack of one pixel's channels, or one channel where a pack does not divide C; buffers are
// aligned to 16 bytes. In f32 the bits are the CPU's. Moves 5 N H W C sizeof T bytes, one part more where dx is added to.

#include "pack.cuh"

namespace {

constexpr int THREADS = 256;

/// Where the upper left of the four is that belong to `element` of the small picture.
__device__ __forceinline__ uint64_t upper_left(uint64_t element, uint32_t width, uint32_t channels) {
    const uint64_t pixel = element / channels, row = pixel / width;
    return (4 * row * width + 2 * (pixel % width)) * channels + element % channels;
}

template <class T>
__device__ __forceinline__ void upsample(const T *x, T *y, uint64_t n, uint32_t width, uint32_t channels) {
    constexpr int SIZE = Pack<T>::SIZE;
    const uint64_t row = 2ull * width * channels, thread = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (channels % SIZE == 0) {
        if (SIZE * thread >= n)
            return;
        const Pack<T> pack = Pack<T>::load(x + SIZE * thread);
        T *to = y + upper_left(SIZE * thread, width, channels);
        pack.store(to), pack.store(to + channels), pack.store(to + row), pack.store(to + row + channels);
    } else if (thread < n) {
        T *to = y + upper_left(thread, width, channels);
        to[0] = to[channels] = to[row] = to[row + channels] = x[thread];
    }
}

template <class T>
__device__ __forceinline__ void upsample_gradient(const T *dy, T *dx, uint64_t n, uint32_t width, uint32_t channels, bool adds) {
    constexpr int SIZE = Pack<T>::SIZE;
    const uint64_t row = 2ull * width * channels, thread = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    auto sum = [](float a, float b, float c, float d) { return __fadd_rn(__fadd_rn(a, b), __fadd_rn(c, d)); };
    if (channels % SIZE == 0) {
        if (SIZE * thread >= n)
            return;
        const T *from = dy + upper_left(SIZE * thread, width, channels);
        const Pack<T> a = Pack<T>::load(from), b = Pack<T>::load(from + channels);
        const Pack<T> c = Pack<T>::load(from + row), d = Pack<T>::load(from + row + channels);
        Pack<T> result = adds ? Pack<T>::load(dx + SIZE * thread) : Pack<T>{};
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            float value = sum(a.values[i], b.values[i], c.values[i], d.values[i]);
            result.values[i] = adds ? __fadd_rn(result.values[i], value) : value;
        }
        result.store(dx + SIZE * thread);
    } else if (thread < n) {
        const T *from = dy + upper_left(thread, width, channels);
        float value = sum(widened(from[0]), widened(from[channels]), widened(from[row]), widened(from[row + channels]));
        dx[thread] = rounded<T>(adds ? __fadd_rn(widened(dx[thread]), value) : value);
    }
}

} // namespace

KERNEL(THREADS, upsample_f32, const float *x, float *y, uint64_t n, uint32_t width, uint32_t channels) {
    upsample(x, y, n, width, channels);
}

KERNEL(THREADS, upsample_bf16, const bf16 *x, bf16 *y, uint64_t n, uint32_t width, uint32_t channels) { upsample(x, y, n, width, channels); }

KERNEL(THREADS, upsample_gradient_f32, const float *dy, float *dx, uint64_t n, uint32_t width, uint32_t channels, uint32_t adds) {
    upsample_gradient(dy, dx, n, width, channels, adds != 0);
}

KERNEL(THREADS, upsample_gradient_bf16, const bf16 *dy, bf16 *dx, uint64_t n, uint32_t width, uint32_t channels, uint32_t adds) {
    upsample_gradient(dy, dx, n, width, channels, adds != 0);
}
