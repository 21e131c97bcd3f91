// One reverse step, Algorithm 2, line 4, and DDIM as one affine rule (src/ops/p_sample), in place:
//
//   x^_0 = clip(a x + b out), eps^ = c x + d out, x <- c_x0 x^_0 + c_xt x + c_eps eps^ + sigma z
//
//   out        T   [N, H W, P], the network's output; channels from C on are not read
//   table      f32 [S, 9], a row for each step: a, b, c, d, c_x0, c_xt, c_eps, sigma, clip (0 or infinity: none)
//   timesteps  u32 [S]
//   counter    u32 [1], which of the S steps this is; `p_sample_advance` counts on, so that a captured graph is replayed for all
//   seed       u32 [2], low word, high word
//   x          f32 [N, H W, C], updated
//   input      T   [N, H W, P] =, x for the next step's network; channels from C on are 0
//
// z is drawn here, from seed, the image's index (first + n) and the timestep; not where sigma is 0. The bits of x are the CPU's. Grid
// (groups, N); a thread has four elements, those of one draw. Moves N H W (8 C + 2 P sizeof T) bytes.

#include "pack.cuh"
#include "philox.cuh"

namespace {

constexpr int THREADS = 256;

/// Keeps NaN, so that a diverged network is not hidden.
__device__ __forceinline__ float clamped(float value, float limit) { return value < -limit ? -limit : value > limit ? limit : value; }

template <class T>
__device__ __forceinline__ void p_sample(const T *out, const float *table, const uint32_t *timesteps, const uint32_t *counter,
                                         const uint32_t *seed, float *x, T *input, uint32_t first, uint32_t pixels, uint32_t channels,
                                         uint32_t padded) {
    const uint32_t n = blockIdx.y, step = counter[0], group = blockIdx.x * blockDim.x + threadIdx.x;
    const float *row = table + 9 * static_cast<size_t>(step);
    const float limit = row[8] > 0.0f ? row[8] : __uint_as_float(0x7F800000u), sigma = row[7];
    const size_t elements = static_cast<size_t>(pixels) * channels;
    x += n * elements;
    out += n * static_cast<size_t>(pixels) * padded;
    input += n * static_cast<size_t>(pixels) * padded;
    float4 z = make_float4(0, 0, 0, 0);
    if (sigma != 0.0f) {
        const uint64_t key = uint64_t(seed[1]) << 32 | seed[0];
        z = rng::normals(rng::stream(key, rng::SAMPLE_NOISE, 0, first + n, timesteps[step]), group);
    }
    const float noise[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const size_t element = 4 * static_cast<size_t>(group) + k;
        if (element >= elements)
            return;
        const size_t pixel = element / channels, channel = element % channels;
        const float x_t = x[element], o = widened(out[pixel * padded + channel]);
        const float x_0 = clamped(__fadd_rn(__fmul_rn(row[0], x_t), __fmul_rn(row[1], o)), limit);
        const float epsilon = __fadd_rn(__fmul_rn(row[2], x_t), __fmul_rn(row[3], o));
        float value = __fadd_rn(__fadd_rn(__fmul_rn(row[4], x_0), __fmul_rn(row[5], x_t)), __fmul_rn(row[6], epsilon));
        if (sigma != 0.0f)
            value = __fadd_rn(value, __fmul_rn(sigma, noise[k]));
        x[element] = value;
        input[pixel * padded + channel] = rounded<T>(value);
        if (channel + 1 == channels)
            for (uint32_t c = channels; c < padded; c++)
                input[pixel * padded + c] = rounded<T>(0.0f);
    }
}

} // namespace

KERNEL(THREADS, p_sample_f32, const float *out, const float *table, const uint32_t *timesteps, const uint32_t *counter, const uint32_t *seed,
       float *x, float *input, uint32_t first, uint32_t pixels, uint32_t channels, uint32_t padded) {
    p_sample(out, table, timesteps, counter, seed, x, input, first, pixels, channels, padded);
}

KERNEL(THREADS, p_sample_bf16, const bf16 *out, const float *table, const uint32_t *timesteps, const uint32_t *counter, const uint32_t *seed,
       float *x, bf16 *input, uint32_t first, uint32_t pixels, uint32_t channels, uint32_t padded) {
    p_sample(out, table, timesteps, counter, seed, x, input, first, pixels, channels, padded);
}

KERNEL(1, p_sample_advance, uint32_t *counter) { counter[0] += 1; }
