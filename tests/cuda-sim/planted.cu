// Kernels with one fault each, which the machine must find; and one without, which it must not.

#include "copy_async.cuh"
#include "mma.cuh"

KERNEL(64, planted_none, const float *x, float *y) {
    SHARED(float, s, 64);
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float sum = s[63 - threadIdx.x];
    for (int bits = 16; bits > 0; bits /= 2)
        sum += __shfl_xor_sync(~0u, sum, bits);
    y[threadIdx.x] = sum + float(__any_sync(~0u, x[threadIdx.x] > 1e9f));
}

// No fault: hardware is as far off.
KERNEL(64, planted_approximate, const float *x, float *y) {
    y[threadIdx.x] = threadIdx.x % 2 == 0 ? __expf(-x[threadIdx.x]) : __fdividef(1.0f, x[threadIdx.x]);
}

KERNEL(64, planted_write_beyond, const float *x, float *y) { y[threadIdx.x + 1] = x[threadIdx.x]; }

KERNEL(64, planted_read_beyond, const float *x, float *y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

KERNEL(64, planted_shared_beyond, const float *x, float *y) {
    SHARED(float, s, 64);
    s[threadIdx.x + 1] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x] + s[threadIdx.x == 0];
}

// Of what the launch has asked for, 16 bytes at a time.
KERNEL(64, planted_dynamic_shared_beyond, const float *x, float *y) {
    DYNAMIC_SHARED(memory);
    float4 *s = reinterpret_cast<float4 *>(memory);
    s[threadIdx.x + 1] = make_float4(x[threadIdx.x], 0, 0, 0);
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + 1].x;
}

KERNEL(64, planted_no_barrier, const float *x, float *y) {
    SHARED(float, s, 64);
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// The vote waits for a thread's own warp only.
KERNEL(64, planted_vote_for_barrier, const float *x, float *y) {
    SHARED(float, s, 64);
    s[threadIdx.x] = x[threadIdx.x];
    if (__any_sync(~0u, 1))
        y[threadIdx.x] = s[63 - threadIdx.x];
}

// The second round overwrites what a slower thread has not read yet.
KERNEL(64, planted_no_second_barrier, const float *x, float *y) {
    SHARED(float, s, 64);
    float sum = 0;
    for (int round = 0; round < 2; round++) {
        s[threadIdx.x] = x[threadIdx.x] * float(round + 1);
        __syncthreads();
        sum += s[63 - threadIdx.x];
    }
    y[threadIdx.x] = sum;
}

KERNEL(64, planted_barrier_of_a_part, const float *x, float *y) {
    if (threadIdx.x < 32)
        __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

KERNEL(64, planted_shuffle_of_a_part, const float *x, float *y) {
    float value = x[threadIdx.x];
    if (threadIdx.x % 32 < 16)
        value = __shfl_xor_sync(~0u, value, 1);
    y[threadIdx.x] = value;
}

KERNEL(64, planted_shuffle_from_outside, const float *x, float *y) {
    float value = x[threadIdx.x];
    if (threadIdx.x % 32 < 16)
        value = __shfl_sync(0xFFFFu, value, 20);
    y[threadIdx.x] = value;
}

KERNEL(64, planted_unwritten_shared, const float *x, float *y) {
    SHARED(float, s, 64);
    if (threadIdx.x > 0)
        s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

KERNEL(64, planted_unwritten_decides, const float *x, float *y) {
    SHARED(float, s, 64);
    y[threadIdx.x] = s[threadIdx.x] > 0 ? x[threadIdx.x] : -x[threadIdx.x];
}

KERNEL(64, planted_unwritten_global, const float *x, float *y) {
    // An output is no place to add to.
    y[threadIdx.x] += x[threadIdx.x];
}

KERNEL(64, planted_unwritten_output, const float *x, float *y) {
    if (threadIdx.x != 40)
        y[threadIdx.x] = x[threadIdx.x];
}

KERNEL(64, planted_misaligned, const float *x, float *y) {
    if (threadIdx.x < 15)
        *reinterpret_cast<float4 *>(y + 4 * threadIdx.x + 1) = *reinterpret_cast<const float4 *>(x + 4 * threadIdx.x);
}

KERNEL(64, planted_written_input, float *x, float *y) {
    y[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = 0;
}

KERNEL(64, planted_race_of_blocks, const float *x, float *y) {
    // Every block writes the same places.
    y[threadIdx.x] = x[threadIdx.x] + float(blockIdx.x);
}

namespace {

/// 16 bytes of x for each of the first threads.
void begin_copy(float *to, const float *x) {
    if (threadIdx.x < 16)
        copy_async(reinterpret_cast<uint4 *>(to + 4 * threadIdx.x), reinterpret_cast<const uint4 *>(x));
}

} // namespace

KERNEL(64, planted_copy_without_wait, const float *x, float *y) {
    SHARED(float, s, 64);
    begin_copy(s, x + 4 * threadIdx.x);
    commit_copies();
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

KERNEL(64, planted_copy_without_commit, const float *x, float *y) {
    SHARED(float, s, 64);
    begin_copy(s, x + 4 * threadIdx.x);
    wait_for_copies<0>();
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

KERNEL(64, planted_copy_of_others, const float *x, float *y) {
    SHARED(float, s, 64);
    begin_copy(s, x + 4 * threadIdx.x);
    commit_copies();
    wait_for_copies<0>();
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// The second copy begins while slower threads still read the first.
KERNEL(64, planted_copy_too_early, const float *x, float *y) {
    SHARED(float, s, 64);
    begin_copy(s, x + 4 * threadIdx.x);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    begin_copy(s, x + 60 - 4 * threadIdx.x);
    commit_copies();
    y[threadIdx.x] = s[63 - threadIdx.x];
    wait_for_copies<0>();
}

KERNEL(64, planted_copy_misaligned, const float *x, float *y) {
    SHARED(float, s, 68);
    begin_copy(s + 1, x + 4 * threadIdx.x);
    y[threadIdx.x] = x[threadIdx.x];
}

KERNEL(64, planted_mma_of_a_part, const float *x, float *y) {
    float c[4] = {x[threadIdx.x], 0, 0, 0};
    const uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x % 32 < 16)
        mma::multiply(c, a, b);
    y[threadIdx.x] = c[0];
}

KERNEL(64, planted_ldmatrix_of_global, const float *x, float *y) {
    uint32_t matrices[4];
    mma::load(matrices, reinterpret_cast<const bf16 *>(x + 4 * (threadIdx.x % 16)));
    y[threadIdx.x] = __uint_as_float(matrices[0]);
}

// One warp of a block of 48 threads is half there.
KERNEL(64, planted_mma_of_half_a_warp, const float *x, float *y) {
    float c[4] = {x[threadIdx.x], 0, 0, 0};
    const uint32_t a[4] = {}, b[2] = {};
    mma::multiply(c, a, b);
    y[threadIdx.x] = c[0];
}
