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
//
// Squares are summed in f64, in an order that depends on the shape alone. In f32 the gradient's bits are the CPU's. Grid (groups, N); a thread
// has four elements, those of one draw. Moves N H W (2 P sizeof T + C) bytes.

#include "pack.cuh"
#include "pictures.cuh"
#include "reduce.cuh"

namespace {

constexpr int THREADS = 256;

template <class T>
__device__ __forceinline__ void mse_loss(const T *out, const uint8_t *pixels, const uint32_t *indices, const uint32_t *t, const float2 *table,
                                         const uint32_t *clock, T *gradient, double *partials, uint64_t seed, const Image &image, float scale,
                                         bool flip) {
    const uint32_t j = blockIdx.y, step = clock[0], sample = clock[1] + j;
    const bool is_mirrored = mirrored(flip, seed, sample, step);
    const size_t area = image.area(), elements = area * image.channels;
    const float2 target = table[t[j]];
    pixels += (indices ? indices[j] : j) * elements;
    out += j * area * image.padded;
    gradient += j * area * image.padded;

    const uint32_t group = blockIdx.x * blockDim.x + threadIdx.x;
    const float4 normals = rng::normals(rng::stream(seed, rng::NOISE, 0, sample, step), group);
    const float epsilon[4] = {normals.x, normals.y, normals.z, normals.w};
    double sum = 0.0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const size_t element = 4 * static_cast<size_t>(group) + k;
        if (element >= elements)
            break;
        const size_t pixel = element / image.channels, channel = element % image.channels;
        const float x_0 = x_0_of(pixels[source(image, pixel, is_mirrored) * image.channels + channel]);
        const size_t at = pixel * image.padded + channel;
        const float expected = __fadd_rn(__fmul_rn(target.x, x_0), __fmul_rn(target.y, epsilon[k]));
        const float difference = __fsub_rn(widened(out[at]), expected);
        gradient[at] = rounded<T>(__fmul_rn(scale, difference));
        sum += double(difference) * double(difference);
        if (channel + 1 == size_t(image.channels))
            for (int c = image.channels; c < image.padded; c++)
                gradient[pixel * image.padded + c] = rounded<T>(0.0f);
    }
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
