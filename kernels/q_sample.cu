// x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon (eq. 4), from u8 pixels in one pass: Algorithm 1, lines 2 to 4.
//
//   pixels   u8  [M, H, W, C], M images of a data set on the device, or of a batch; aligned to 4 bytes
//   indices  u32 [N], which of them the batch takes; null: the first N
//   table    f32 [T, 2], sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t)
//   clock    u32 [4], step and the place of image 0 in the global batch (src/ops/q_sample/batch.rs)
//   x_t      T   [N, H, W, P] =, P >= C; channels from C on are 0
//   t        u32 [N]          =
//
// t, epsilon and the flip are drawn here and drawn again by the loss: epsilon is not stored. x_0 = (2 pixel - 255)/255. In f32 the bits are
// those of the CPU. Grid (ceil(H W / (4 THREADS)), N); a thread has four pixels and draws the C groups of normals that are theirs.
// Moves N H W (C + P sizeof T) bytes.

#include "pictures.cuh"

namespace {

constexpr int THREADS = 128;

template <class T, int C>
__device__ __forceinline__ void blend(const uint8_t *pixels, T *x_t, const Image &image, const rng::Stream &noise, float2 weights,
                                      bool is_mirrored, int first) {
    const int channels = C ? C : image.channels;
    const PictureReader<C> picture(pixels, image, first, is_mirrored);
    PixelNormals epsilon(noise, static_cast<uint32_t>(first / PIXELS * channels));
#pragma unroll
    for (int i = 0; i < PIXELS; i++) {
        if (first + i >= image.height * image.width)
            return;
        PixelWriter<T, C> to(x_t + static_cast<size_t>(first + i) * image.padded, image.padded);
#pragma unroll
        for (int c = 0; c < channels; c++)
            to.set(c, __fadd_rn(__fmul_rn(weights.x, x_0_of(picture.at(i, c))), __fmul_rn(weights.y, epsilon[i * channels + c])));
        to.finish(channels);
    }
}

template <class T>
__device__ __forceinline__ void q_sample(const uint8_t *pixels, const uint32_t *indices, const float2 *table, const uint32_t *clock, T *x_t,
                                         uint32_t *t, uint64_t seed, const Image &image, uint32_t timesteps, bool flip) {
    const uint32_t j = blockIdx.y, step = clock[0], sample = clock[1] + j;
    const uint32_t mine = __umulhi(rng::first_word(rng::stream(seed, rng::TIMESTEP, 0, sample, step)), timesteps);
    const bool is_mirrored = mirrored(flip, seed, sample, step);
    if (blockIdx.x == 0 && threadIdx.x == 0)
        t[j] = mine;
    const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * PIXELS;
    const size_t area = image.area();
    pixels += (indices ? indices[j] : j) * area * image.channels;
    x_t += j * area * image.padded;
    const rng::Stream noise = rng::stream(seed, rng::NOISE, 0, sample, step);
    with_channels(image.channels, [&](auto channels) {
        blend<T, decltype(channels)::COUNT>(pixels, x_t, image, noise, table[mine], is_mirrored, first);
    });
}

} // namespace

KERNEL(THREADS, q_sample_f32, const uint8_t *pixels, const uint32_t *indices, const float2 *table, const uint32_t *clock, float *x_t,
       uint32_t *t, uint64_t seed, Image image, uint32_t timesteps, uint32_t flip) {
    q_sample(pixels, indices, table, clock, x_t, t, seed, image, timesteps, flip != 0);
}

KERNEL(THREADS, q_sample_bf16, const uint8_t *pixels, const uint32_t *indices, const float2 *table, const uint32_t *clock, bf16 *x_t,
       uint32_t *t, uint64_t seed, Image image, uint32_t timesteps, uint32_t flip) {
    q_sample(pixels, indices, table, clock, x_t, t, seed, image, timesteps, flip != 0);
}
