// y = x sigma(x), and dx (+)= dy sigma(x) (1 + x (1 - sigma(x))), any shape (src/ops/silu): n elements, buffers aligned to 16 bytes.
// Moves 2 n sizeof T bytes forward, 3 backward, one more where dx is added to.

#include "elementwise.cuh"

namespace {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Silu {
    __device__ __forceinline__ float operator()(float x) const { return x * sigmoid(x); }
};

struct SiluGradient {
    __device__ __forceinline__ float operator()(float x, float dy) const {
        float s = sigmoid(x);
        return dy * (s * (1.0f + x * (1.0f - s)));
    }
};

} // namespace

KERNEL(ELEMENTWISE_THREADS, silu_f32, const float *x, float *y, uint64_t n) { elementwise(n, y, false, Silu{}, x); }

KERNEL(ELEMENTWISE_THREADS, silu_bf16, const bf16 *x, bf16 *y, uint64_t n) { elementwise(n, y, false, Silu{}, x); }

KERNEL(ELEMENTWISE_THREADS, silu_gradient_f32, const float *x, const float *dy, float *dx, uint64_t n, uint32_t adds) {
    elementwise(n, dx, adds != 0, SiluGradient{}, x, dy);
}

KERNEL(ELEMENTWISE_THREADS, silu_gradient_bf16, const bf16 *x, const bf16 *dy, bf16 *dx, uint64_t n, uint32_t adds) {
    elementwise(n, dx, adds != 0, SiluGradient{}, x, dy);
}
