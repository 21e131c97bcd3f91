// One reverse step, Algorithm 2, line 4, and DDIM as one affine rule (src/ops/p_sample), in place:
//
//   x^_0 = clip(a x + b out), eps^ = c x + d out, x <- c_x0 x^_0 + c_xt x + c_eps eps^ + sigma z
//
//   out        T   [N, H W, P], the network's output; channels from C on are not read
//   table      f32 [S, 9], a row for each step: a, b, c, d, c_x0, c_xt, c_eps, sigma, clip (0 or infinity: none)
//   timesteps  u32 [S]
//   clock      u32 [4]: which of the S steps this is, index of the first image, seed's low word, its high word
//   x          f32 [N, H W, C], updated
//   input      T   [N, H W, P] =, x for the next step's network; channels from C on are 0
//
// p_sample_advance counts the clock on and writes the next step's timestep for each image, so that a captured graph is replayed for all steps.
//
// z is drawn here, from seed, the image's index (first + n) and the timestep; not where sigma is 0. The bits of x are the CPU's. Grid
// (ceil(H W / (4 THREADS)), N); a thread has four pixels. Moves N H W (8 C + 2 P sizeof T) bytes.

#include "pictures.cuh"

namespace {

constexpr int THREADS = 128;

/// A row of the table.
struct Step {
    float a, b, c, d, c_x_0, c_x_t, c_epsilon, sigma, limit;
};

/// Keeps NaN, so that a diverged network is not hidden.
__device__ __forceinline__ float clamped(float value, float limit) { return value < -limit ? -limit : value > limit ? limit : value; }

__device__ __forceinline__ float reverse(const Step &s, float x_t, float out, float z) {
    const float x_0 = clamped(__fadd_rn(__fmul_rn(s.a, x_t), __fmul_rn(s.b, out)), s.limit);
    const float epsilon = __fadd_rn(__fmul_rn(s.c, x_t), __fmul_rn(s.d, out));
    const float mean = __fadd_rn(__fadd_rn(__fmul_rn(s.c_x_0, x_0), __fmul_rn(s.c_x_t, x_t)), __fmul_rn(s.c_epsilon, epsilon));
    return s.sigma != 0.0f ? __fadd_rn(mean, __fmul_rn(s.sigma, z)) : mean;
}

/// The four elements of a group of x, in one access where groups are aligned.
struct Group {
    __device__ __forceinline__ void load(const float *from, int count, bool is_aligned) {
        if (is_aligned)
            four = Pack<float>::load(from);
        else
            for (int k = 0; k < count; k++)
                four.values[k] = from[k];
    }
    __device__ __forceinline__ void store(float *to, int count, bool is_aligned) const {
        if (is_aligned)
            four.store(to);
        else
            for (int k = 0; k < count; k++)
                to[k] = four.values[k];
    }
    Pack<float> four;
};

template <class T, int C>
__device__ __forceinline__ void p_sample_pixels(const T *out, float *x, T *input, const Step &step, const rng::Stream &noise, int first,
                                                int pixels, int image_channels, int padded) {
    const int channels = C ? C : image_channels;
    const int count = pixels - first < PIXELS ? pixels - first : PIXELS;
    // Of all images, if of one.
    const bool is_aligned = pixels % PIXELS == 0;
    PixelNormals normals(noise, static_cast<uint32_t>(first / PIXELS * channels));
    x += static_cast<size_t>(first) * channels;
    Group group;
#pragma unroll
    for (int i = 0; i < PIXELS; i++) {
        if (i >= count)
            return;
        const size_t at = static_cast<size_t>(first + i) * padded;
        PixelReader<T, C> from(out + at, padded);
        PixelWriter<T, C> to(input + at, padded);
#pragma unroll
        for (int c = 0; c < channels; c++) {
            const int element = i * channels + c, place = element % 4, left = count * channels - (element - place);
            const int size = left < 4 ? left : 4;
            if (place == 0)
                group.load(x + element, size, is_aligned);
            const float z = step.sigma != 0.0f ? normals[element] : 0.0f;
            const float value = reverse(step, group.four.values[place], from[c], z);
            group.four.values[place] = value;
            to.set(c, value);
            if (place + 1 == size)
                group.store(x + element - place, size, is_aligned);
        }
        to.finish(channels);
    }
}

template <class T>
__device__ __forceinline__ void p_sample(const T *out, const float *table, const uint32_t *timesteps, const uint32_t *clock, float *x,
                                         T *input, uint32_t pixels, uint32_t channels, uint32_t padded) {
    const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * PIXELS;
    if (first >= static_cast<int>(pixels))
        return;
    const uint32_t n = blockIdx.y, number = clock[0];
    const float *row = table + 9 * static_cast<size_t>(number);
    const float limit = row[8] > 0.0f ? row[8] : __uint_as_float(0x7F800000u);
    const Step step = {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], limit};
    const uint64_t key = uint64_t(clock[3]) << 32 | clock[2];
    const rng::Stream noise = rng::stream(key, rng::SAMPLE_NOISE, 0, clock[1] + n, timesteps[number]);
    x += n * static_cast<size_t>(pixels) * channels;
    out += n * static_cast<size_t>(pixels) * padded;
    input += n * static_cast<size_t>(pixels) * padded;
    with_channels(channels, [&](auto known) {
        p_sample_pixels<T, decltype(known)::COUNT>(out, x, input, step, noise, first, pixels, channels, padded);
    });
}

} // namespace

KERNEL(THREADS, p_sample_f32, const float *out, const float *table, const uint32_t *timesteps, const uint32_t *clock, float *x, float *input,
       uint32_t pixels, uint32_t channels, uint32_t padded) {
    p_sample(out, table, timesteps, clock, x, input, pixels, channels, padded);
}

KERNEL(THREADS, p_sample_bf16, const bf16 *out, const float *table, const uint32_t *timesteps, const uint32_t *clock, float *x, bf16 *input,
       uint32_t pixels, uint32_t channels, uint32_t padded) {
    p_sample(out, table, timesteps, clock, x, input, pixels, channels, padded);
}

// One block. After the last step it leaves that one's timestep.
KERNEL(THREADS, p_sample_advance, const uint32_t *timesteps, uint32_t *clock, uint32_t *t, uint32_t steps, uint32_t images) {
    const uint32_t next = clock[0] + 1;
    for (uint32_t n = threadIdx.x; n < images; n += blockDim.x)
        t[n] = timesteps[next < steps ? next : steps - 1];
    __syncthreads();
    if (threadIdx.x == 0)
        clock[0] = next;
}
