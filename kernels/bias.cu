// y += b (+ residual), in place: the end of a convolution whose library has computed no more than its sums (src/device/cuda/dnn).
//
//   b         T [C]
//   residual  T [R, C], or null
//   y         T [R, C], added to
//
// n = R C elements; buffers aligned to 16 bytes, whatever C is. Added in this order in f32 and rounded once. A thread has 16 bytes of y and of
// the residual. Moves 2 n sizeof T bytes, 3 with a residual; 1 or 2 FLOPs an element.

#include "pack.cuh"

namespace {

constexpr int THREADS = 256;

template <class T>
__device__ __forceinline__ void bias(const T *b, const T *residual, T *y, uint64_t n, uint32_t channels) {
    constexpr int SIZE = Pack<T>::SIZE;
    const uint64_t first = SIZE * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    uint32_t channel = first % channels;
    if (first + SIZE <= n) {
        Pack<T> sum = Pack<T>::load(y + first), more = {};
        if (residual)
            more = Pack<T>::load(residual + first);
        if (channels % SIZE == 0) {
            const Pack<T> terms = Pack<T>::load(b + channel);
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                sum.values[i] = __fadd_rn(sum.values[i], terms.values[i]);
        } else {
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                sum.values[i] = __fadd_rn(sum.values[i], widened(b[channel]));
                channel = channel + 1 == channels ? 0 : channel + 1;
            }
        }
        if (residual) {
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                sum.values[i] = __fadd_rn(sum.values[i], more.values[i]);
        }
        sum.store(y + first);
    } else {
        for (uint64_t i = first; i < n; i++) {
            const float sum = __fadd_rn(widened(y[i]), widened(b[i % channels]));
            y[i] = rounded<T>(residual ? __fadd_rn(sum, widened(residual[i])) : sum);
        }
    }
}

} // namespace

KERNEL(THREADS, bias_f32, const float *b, const float *residual, float *y, uint64_t n, uint32_t channels) {
    bias(b, residual, y, n, channels);
}

KERNEL(THREADS, bias_bf16, const bf16 *b, const bf16 *residual, bf16 *y, uint64_t n, uint32_t channels) {
    bias(b, residual, y, n, channels);
}
