// The loss of each image, (1/HWC) sum (out - target)^2 with target = a x_0 + b epsilon, and its gradient (src/ops/loss): eq. 14 for epsilon,
// and its likes for x_0 and v, as the table says.
//
//   out       T   [N, H, W, P], the network's output; channels from C on are not read
//   pixels    u8  [M, H, W, C], and indices u32 [N] or null, as for q_sample
//   t         u32 [N], as q_sample drew it
//   table     f32 [T, 2], a and b
//   clock     u32 [4], as for q_sample: epsilon and the flip are drawn again
//   gradient  T   [N, H, W, P] =, scale (out - target); channels from C on are 0. All NaN where the image's loss is past f32.
//   partials  f64 [N, gridDim.x of mse_loss] =
//   loss      f32 [N] =
//   quartiles f64 [4, 2] =, sum and number of the losses whose t lies in each quarter of 0 to T - 1, added in the order of the images
//
// Squares are summed in f64, in an order that depends on the shape alone. In f32 the gradient's bits are the CPU's. Grid
// (ceil(H W / (4 THREADS)), N); a thread has four pixels and draws their normals again. Moves N H W (2 P sizeof T + C) bytes.

#include "pictures.cuh"
#include "reduce.cuh"

namespace {

constexpr int THREADS = 128;

/// What is the same for all pixels of an image.
struct Target {
    float2 weights;
    rng::Stream noise;
    bool is_mirrored;
    float scale;
};

/// The sum of squares of a thread's pixels.
template <class T, int C>
__device__ __forceinline__ double differences(const T *out, const uint8_t *pixels, T *gradient, const Image &image, const Target &target,
                                              int first) {
    const int channels = C ? C : image.channels;
    const PictureReader<C> picture(pixels, image, first, target.is_mirrored);
    PixelNormals epsilon(target.noise, static_cast<uint32_t>(first / PIXELS * channels));
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < PIXELS; i++) {
        if (first + i >= image.height * image.width)
            return sum;
        const size_t at = static_cast<size_t>(first + i) * image.padded;
        PixelReader<T, C> from(out + at, image.padded);
        PixelWriter<T, C> to(gradient + at, image.padded);
#pragma unroll
        for (int c = 0; c < channels; c++) {
            const float data = __fmul_rn(target.weights.x, x_0_of(picture.at(i, c)));
            const float expected = __fadd_rn(data, __fmul_rn(target.weights.y, epsilon[i * channels + c]));
            const float difference = __fsub_rn(from[c], expected);
            to.set(c, __fmul_rn(target.scale, difference));
            sum += double(difference) * double(difference);
        }
        to.finish(channels);
    }
    return sum;
}

template <class T>
__device__ __forceinline__ void mse_loss(const T *out, const uint8_t *pixels, const uint32_t *indices, const uint32_t *t, const float2 *table,
                                         const uint32_t *clock, T *gradient, double *partials, uint64_t seed, const Image &image, float scale,
                                         bool flip) {
    const uint32_t j = blockIdx.y, step = clock[0], sample = clock[1] + j;
    const rng::Stream noise = rng::stream(seed, rng::NOISE, 0, sample, step);
    const Target target = {table[t[j]], noise, mirrored(flip, seed, sample, step), scale};
    const size_t area = image.area();
    pixels += (indices ? indices[j] : j) * area * image.channels;
    out += j * area * image.padded;
    gradient += j * area * image.padded;
    const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * PIXELS;
    double sum = 0.0;
    with_channels(image.channels, [&](auto channels) {
        sum = differences<T, decltype(channels)::COUNT>(out, pixels, gradient, image, target, first);
    });
    sum = block_sum<double, THREADS>(sum);
    if (threadIdx.x == 0)
        partials[static_cast<size_t>(j) * gridDim.x + blockIdx.x] = sum;
}

/// One block an image.
template <class T>
__device__ __forceinline__ void mse_loss_total(const double *partials, T *gradient, float *loss, uint32_t count, const Image &image) {
    const uint32_t j = blockIdx.x;
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < count; i += THREADS)
        sum += partials[static_cast<size_t>(j) * count + i];
    sum = block_sum<double, THREADS>(sum);
    const size_t area = image.area();
    const float mean = float(sum / double(area * image.channels));
    if (threadIdx.x == 0)
        loss[j] = mean;
    if (mean - mean == 0.0f)
        return;
    // Whoever adds up gradients, over shards and ranks too, is to learn of it.
    const size_t values = area * image.padded;
    for (size_t i = threadIdx.x; i < values; i += THREADS)
        gradient[j * values + i] = rounded<T>(__uint_as_float(0x7FFFFFFFu));
}

} // namespace

KERNEL(THREADS, mse_loss_f32, const float *out, const uint8_t *pixels, const uint32_t *indices, const uint32_t *t, const float2 *table,
       const uint32_t *clock, float *gradient, double *partials, uint64_t seed, Image image, float scale, uint32_t flip) {
    mse_loss(out, pixels, indices, t, table, clock, gradient, partials, seed, image, scale, flip != 0);
}

KERNEL(THREADS, mse_loss_bf16, const bf16 *out, const uint8_t *pixels, const uint32_t *indices, const uint32_t *t, const float2 *table,
       const uint32_t *clock, bf16 *gradient, double *partials, uint64_t seed, Image image, float scale, uint32_t flip) {
    mse_loss(out, pixels, indices, t, table, clock, gradient, partials, seed, image, scale, flip != 0);
}

KERNEL(THREADS, mse_loss_total_f32, const double *partials, float *gradient, float *loss, uint32_t count, Image image) {
    mse_loss_total(partials, gradient, loss, count, image);
}

KERNEL(THREADS, mse_loss_total_bf16, const double *partials, bf16 *gradient, float *loss, uint32_t count, Image image) {
    mse_loss_total(partials, gradient, loss, count, image);
}

/// One block.
KERNEL(THREADS, mse_loss_quartiles, const float *loss, const uint32_t *t, double *quartiles, uint32_t images, uint32_t timesteps) {
    SHARED(float, losses, THREADS);
    SHARED(uint32_t, quarters, THREADS);
    double sum = 0.0, number = 0.0;
    for (uint32_t first = 0; first < images; first += THREADS) {
        const uint32_t mine = first + threadIdx.x;
        if (mine < images) {
            losses[threadIdx.x] = loss[mine];
            quarters[threadIdx.x] = uint32_t(4 * uint64_t(t[mine]) / timesteps);
        }
        __syncthreads();
        const uint32_t count = images - first < THREADS ? images - first : THREADS;
        for (uint32_t i = 0; threadIdx.x < 4 && i < count; i++)
            if (quarters[i] == threadIdx.x)
                sum += double(losses[i]), number += 1.0;
        __syncthreads();
    }
    if (threadIdx.x < 4)
        quartiles[2 * threadIdx.x] = sum, quartiles[2 * threadIdx.x + 1] = number;
}
