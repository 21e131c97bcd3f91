// Twice the height and width by the nearest pixel, and its gradient, the sum of the four (src/ops/upsample).
//
//   x, dx   T [N, H, W, C]
//   y, dy   T [N, 2H, 2W, C]
//
// Forward y =, backward dx (+)=. A thread has a pack of one pixel's channels, or one channel where a pack does not divide C; buffers are
// aligned to 16 bytes; 2 W C is less than 2^32. In f32 the bits are the CPU's. Grid (N H, parts of a row). Moves 5 N H W C sizeof T bytes,
// one part more where dx is added to.

#include "pack.cuh"

namespace {

constexpr int THREADS = 256;

/// Where the thread's `SIZE` channels are: in the small picture, and the upper left of the four that belong to it.
struct Place {
    bool is_there;
    uint64_t small, upper_left;
};

template <int SIZE> __device__ __forceinline__ Place place(uint32_t width, uint32_t channels) {
    // Of a row: no division of 64 bits.
    const uint32_t element = SIZE * (blockIdx.y * blockDim.x + threadIdx.x), pixel = element / channels;
    const uint64_t before = uint64_t(blockIdx.x) * width * channels;
    return {pixel < width, before + element, 4 * before + pixel * channels + element};
}

template <class T, int SIZE> __device__ __forceinline__ void upsample_pack(const T *x, T *y, uint32_t width, uint32_t channels) {
    const Place at = place<SIZE>(width, channels);
    if (!at.is_there)
        return;
    const uint64_t row = 2ull * width * channels;
    const Pack<T, SIZE> pack = Pack<T, SIZE>::load(x + at.small);
    T *to = y + at.upper_left;
    pack.store(to), pack.store(to + channels), pack.store(to + row), pack.store(to + row + channels);
}

template <class T, int SIZE>
__device__ __forceinline__ void upsample_gradient_pack(const T *dy, T *dx, uint32_t width, uint32_t channels, bool adds) {
    using Packed = Pack<T, SIZE>;
    const Place at = place<SIZE>(width, channels);
    if (!at.is_there)
        return;
    const uint64_t row = 2ull * width * channels;
    const T *from = dy + at.upper_left;
    const Packed a = Packed::load(from), b = Packed::load(from + channels);
    const Packed c = Packed::load(from + row), d = Packed::load(from + row + channels);
    Packed result = adds ? Packed::load(dx + at.small) : Packed{};
#pragma unroll
    for (int i = 0; i < SIZE; i++) {
        const float value = __fadd_rn(__fadd_rn(a.values[i], b.values[i]), __fadd_rn(c.values[i], d.values[i]));
        result.values[i] = adds ? __fadd_rn(result.values[i], value) : value;
    }
    result.store(dx + at.small);
}

template <class T> __device__ __forceinline__ void upsample(const T *x, T *y, uint32_t width, uint32_t channels) {
    if (channels % Pack<T>::SIZE == 0)
        upsample_pack<T, Pack<T>::SIZE>(x, y, width, channels);
    else
        upsample_pack<T, 1>(x, y, width, channels);
}

template <class T>
__device__ __forceinline__ void upsample_gradient(const T *dy, T *dx, uint32_t width, uint32_t channels, bool adds) {
    if (channels % Pack<T>::SIZE == 0)
        upsample_gradient_pack<T, Pack<T>::SIZE>(dy, dx, width, channels, adds);
    else
        upsample_gradient_pack<T, 1>(dy, dx, width, channels, adds);
}

} // namespace

KERNEL(THREADS, upsample_f32, const float *x, float *y, uint32_t width, uint32_t channels) {
    upsample(x, y, width, channels);
}

KERNEL(THREADS, upsample_bf16, const bf16 *x, bf16 *y, uint32_t width, uint32_t channels) { upsample(x, y, width, channels); }

KERNEL(THREADS, upsample_gradient_f32, const float *dy, float *dx, uint32_t width, uint32_t channels, uint32_t adds) {
    upsample_gradient(dy, dx, width, channels, adds != 0);
}

KERNEL(THREADS, upsample_gradient_bf16, const bf16 *dy, bf16 *dx, uint32_t width, uint32_t channels, uint32_t adds) {
    upsample_gradient(dy, dx, width, channels, adds != 0);
}
