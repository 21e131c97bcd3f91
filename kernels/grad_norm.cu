// The L2 norm of all gradients, and whether each is finite, in two stages (src/ops/grad_norm).
//
//   gradients   f32 [n], n a multiple of 4, aligned to 16 bytes
//   partials    f64 [gridDim.x of grad_norm_partial] =
//   norm        f32 [2] =: the norm (at most the largest f32 where all gradients are finite), and 1 if they are, else 0
//
// Squares are summed in f64: the sum of finite numbers is finite, that of others never. Each partial is of a contiguous piece, so that the
// order of additions depends on n and the grid alone. Moves 4 n bytes.

#include "pack.cuh"
#include "reduce.cuh"

namespace {

constexpr int THREADS = 256;
constexpr float LARGEST = 3.4028234663852886e38f;

__device__ __forceinline__ double square(float x) { return double(x) * double(x); }

} // namespace

KERNEL(THREADS, grad_norm_partial, const float *gradients, double *partials, uint64_t n) {
    // In groups of 4, so many for each block.
    const uint64_t groups = n / 4, each = (groups + gridDim.x - 1) / gridDim.x;
    const uint64_t begin = blockIdx.x * each, end = begin + each < groups ? begin + each : groups;
    double sum = 0.0;
    for (uint64_t group = begin + threadIdx.x; group < end; group += THREADS) {
        const Pack<float> g = Pack<float>::load(gradients + 4 * group);
        sum += square(g.values[0]) + square(g.values[1]) + (square(g.values[2]) + square(g.values[3]));
    }
    sum = block_sum<double, THREADS>(sum);
    if (threadIdx.x == 0)
        partials[blockIdx.x] = sum;
}

KERNEL(THREADS, grad_norm_total, const double *partials, float *norm, uint32_t count) {
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < count; i += THREADS)
        sum += partials[i];
    sum = block_sum<double, THREADS>(sum);
    if (threadIdx.x == 0) {
        const bool is_finite = sum - sum == 0.0;
        const float root = float(sqrt(sum));
        norm[0] = is_finite ? fminf(root, LARGEST) : root;
        norm[1] = is_finite ? 1.0f : 0.0f;
    }
}
