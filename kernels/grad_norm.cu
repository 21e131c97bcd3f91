// The L2 norm of all gradients, and whether each is finite, in two stages (src/ops/grad_norm).
//
//   gradients   f32 [n], n a multiple of 4, aligned to 16 bytes
//   sums        f64 [ceil(n / BLOCK)] =, of the squares of each BLOCK of them
//   norm        f32 [2] =: the norm (at most the largest f32 where all gradients are finite), and 1 if they are, else 0
//
// Squares are summed in f64: the sum of finite numbers is finite, that of others never. The sum of a block depends on nothing outside it,
// so that the bits are the same whichever of them a launch sums. Moves 4 n bytes.

#include "pack.cuh"
#include "reduce.cuh"

namespace {

constexpr int THREADS = 256, ALL_THREADS = 1024;
constexpr uint64_t BLOCK = 4096;
constexpr float LARGEST = 3.4028234663852886e38f;

__device__ __forceinline__ double square(float x) { return double(x) * double(x); }

} // namespace

KERNEL(THREADS, square_sums, const float *gradients, double *sums, uint64_t n) {
    const uint64_t begin = blockIdx.x * BLOCK, end = begin + BLOCK < n ? begin + BLOCK : n;
    double sum = 0.0;
    for (uint64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * THREADS) {
        const Pack<float> g = Pack<float>::load(gradients + i);
        sum += square(g.values[0]) + square(g.values[1]) + (square(g.values[2]) + square(g.values[3]));
    }
    sum = block_sum<double, THREADS>(sum);
    if (threadIdx.x == 0)
        sums[blockIdx.x] = sum;
}

KERNEL(ALL_THREADS, grad_norm, const double *sums, float *norm, uint32_t count) {
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < count; i += ALL_THREADS)
        sum += sums[i];
    sum = block_sum<double, ALL_THREADS>(sum);
    if (threadIdx.x == 0) {
        const bool is_finite = sum - sum == 0.0;
        const float root = float(sqrt(sum));
        norm[0] = is_finite ? fminf(root, LARGEST) : root;
        norm[1] = is_finite ? 1.0f : 0.0f;
    }
}
