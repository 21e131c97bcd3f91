// y = a + b, any shape (src/ops/add): n elements, buffers aligned to 16 bytes. In f32 the bits are the CPU's. Moves 3 n sizeof T bytes.

#include "elementwise.cuh"

KERNEL(ELEMENTWISE_THREADS, add_f32, const float *a, const float *b, float *y, uint64_t n) {
    elementwise(n, y, false, [](float a, float b) { return __fadd_rn(a, b); }, a, b);
}

KERNEL(ELEMENTWISE_THREADS, add_bf16, const bf16 *a, const bf16 *b, bf16 *y, uint64_t n) {
    elementwise(n, y, false, [](float a, float b) { return __fadd_rn(a, b); }, a, b);
}
