// Group normalisation with what stands around it folded in (src/ops/group_norm):
//
//   u = [x1, x2] + term,  z = (gamma (u - mean) rstd + beta) (1 + scale) + shift,  y = dropout(SiLU(z)),  SiLU and dropout where asked.
//
//   x1, x2       T   [N, H, W, C1], [N, H, W, C2]; x2 null where C2 = 0. A group may have channels of both.
//   gamma, beta  f32 [C], C = C1 + C2
//   timestep     T   [N, columns], of which C from `first_column` on are the channels' term, added before the norm as in Ho et al. 2020; or
//                    with `scales` C are scale and C more shift, as in Nichol & Dhariwal 2021. What is not there is 0; null: nothing.
//   clock        u32 [4], step and global index of the first sample, from which masks are drawn; null: no dropout
//   y            T   [N, H, W, C] =
//   statistics   f32 [N, groups, 2] =, mean of u and rstd
//
// Buffers are aligned to 16 bytes. group_norm: a block holds all pixels of some whole groups in shared memory, and moves 2 N H W C sizeof T
// bytes. Where that does not fit there are two passes: group_norm_moments takes the moments of each channel of a chunk of pixels (workspace
// float2 [N, chunks, C]), group_norm_statistics those of the groups, group_norm_apply writes y; 3 parts are moved.
//
// A variance is taken about a mean that is known, and those of channels and chunks are combined in f64 as by Chan et al. 1983: a mean far
// from zero costs no digits. Computes 15 FLOPs an element, an exponential with SiLU, and 10 Philox rounds for 4 elements with dropout.

#include "group_norm.cuh"
#include "reduce.cuh"

namespace {

using namespace norms;

/// Mean and variance of some elements.
struct Moments {
    double count, mean, variance;
};

/// Mean and rstd of the union of `parts`, of which `part(i)` gives the moments, by one warp.
template <class F> __device__ __forceinline__ float2 union_of(uint32_t parts, float eps, const F &part) {
    const uint32_t lane = threadIdx.x % WARP;
    double count = 0.0, sum = 0.0, squares = 0.0;
    for (uint32_t i = lane; i < parts; i += WARP) {
        const Moments of = part(i);
        count += of.count, sum += of.count * of.mean;
    }
    count = warp_sum(count);
    const double mean = warp_sum(sum) / count;
    for (uint32_t i = lane; i < parts; i += WARP) {
        const Moments of = part(i);
        squares += of.count * (of.variance + (of.mean - mean) * (of.mean - mean));
    }
    return make_float2(float(mean), float(1.0 / sqrt(warp_sum(squares) / count + double(eps))));
}

/// Mean and variance of each of the block's channels, without the timestep term.
struct ChannelMoments {
    /// A number near the mean; mean and mean square of what is left when it is subtracted.
    const float *near, *rest, *square;
    uint32_t count;

    __device__ __forceinline__ Moments get(uint32_t channel) const {
        const double r = rest[channel], variance = square[channel] - r * r;
        return {double(count), near[channel] + r, variance > 0.0 ? variance : 0.0};
    }
};

/// Copies the block's part of x to the chip, and takes the moments of its channels there.
template <class T, int W>
__device__ __forceinline__ ChannelMoments read_moments(const Norm &norm, const Inputs<T> &inputs, const Place<W> &place,
                                                       const Chip<T, W> &chip) {
    chip.fill(0, place, channels_of(norm, place, inputs.x1, inputs.x2));
    wait_for_copies();
    const auto load = [&](uint32_t pixel) { return *chip.at(0, place, pixel); };
    const uint32_t count = place.end - place.begin;
    const float factor = 1.0f / float(count);
    float *const near = chip.values, *const rest = near + norm.tile, *const square = rest + norm.tile;
    float sum[W] = {}, squares[W] = {}, shift[W];
    for_pixels<2 * FROM_CHIP>(place, load, [&](uint32_t, auto word) {
        const auto x = Pack<T, W>::of(word);
#pragma unroll
        for (int i = 0; i < W; i++)
            sum[i] += x.values[i];
    });
    sum_pixels(place, sum, chip.room, factor, near);
#pragma unroll
    for (int i = 0; i < W; i++)
        shift[i] = near[place.channel - place.first_channel + i], sum[i] = 0.0f;
    for_pixels<2 * FROM_CHIP>(place, load, [&](uint32_t, auto word) {
        const auto x = Pack<T, W>::of(word);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float d = x.values[i] - shift[i];
            sum[i] += d, squares[i] += d * d;
        }
    });
    sum_pixels(place, sum, chip.room, factor, rest);
    sum_pixels(place, squares, chip.room, factor, square);
    return {near, rest, square, count};
}

/// y of the thread's pixels, of which `load` gives the words of x.
template <int LOADS, class T, int W, class F>
__device__ __forceinline__ void write_y(const Norm &norm, const Inputs<T> &inputs, const Place<W> &place, const float2 *statistics, T *y,
                                        const F &load) {
    const Affine<W> affine(norm, inputs, place, statistics);
    const Dropout dropout(norm, inputs.clock, place.image);
    const Channels<T> to = channels_of(norm, place, y);
    const bool silu = norm.silu;
    for_pixels<LOADS>(place, load, [&](uint32_t pixel, auto word) {
        auto pack = Pack<T, W>::of(word);
#pragma unroll
        for (int i = 0; i < W; i++)
            pack.values[i] = affine.z(pack.values[i], i);
        if (silu)
#pragma unroll
            for (int i = 0; i < W; i++)
                pack.values[i] *= sigmoid<T>(pack.values[i]);
        if (dropout.is_drawn)
            dropout.drop(pack.values, uint64_t(pixel) * norm.channels() + place.channel);
#pragma unroll
        for (int i = 0; i < W; i++)
            pack.values[i] *= dropout.scale;
        pack.store(to.at(pixel));
    });
}

template <class T, int W>
__device__ __forceinline__ void group_norm(const Norm &norm, const Inputs<T> &inputs, T *y, float2 *statistics, unsigned char *memory) {
    const Place<W> place(norm);
    const Chip<T, W> chip(norm, place, memory, 1);
    const ChannelMoments moments = read_moments(norm, inputs, place, chip);
    for_groups(norm, place, [&](uint32_t group) {
        const uint32_t first = group * norm.size;
        const float2 found = union_of(norm.size, norm.eps, [&](uint32_t i) {
            Moments of = moments.get(first - place.first_channel + i);
            of.mean += inputs.term(norm, place.image, first + i);
            return of;
        });
        if (threadIdx.x % WARP == 0)
            statistics[place.image * norm.groups + group] = found;
    });
    __syncthreads();
    write_y<FROM_CHIP>(norm, inputs, place, statistics, y, [&](uint32_t pixel) { return *chip.at(0, place, pixel); });
}

/// Mean and variance of each channel of a chunk: [N, chunks, C].
template <class T, int W>
__device__ __forceinline__ void group_norm_moments(const Norm &norm, const Inputs<T> &inputs, float2 *workspace, unsigned char *memory) {
    const Place<W> place(norm);
    const Chip<T, W> chip(norm, place, memory, 1);
    const ChannelMoments moments = read_moments(norm, inputs, place, chip);
    float2 *const to = workspace + (size_t(place.image) * gridDim.y + blockIdx.y) * norm.channels() + place.first_channel;
    for (uint32_t channel = threadIdx.x; channel < place.width; channel += blockDim.x) {
        const Moments of = moments.get(channel);
        to[channel] = make_float2(float(of.mean), float(of.variance));
    }
}

/// A warp for each group of an image.
template <class T>
__device__ __forceinline__ void group_norm_statistics(const Norm &norm, const Inputs<T> &inputs, const float2 *workspace,
                                                      float2 *statistics) {
    const uint32_t group = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, image = blockIdx.y;
    if (group >= norm.groups)
        return;
    const float2 *const first = workspace + size_t(image) * norm.chunks() * norm.channels() + group * norm.size;
    const float2 found = union_of(norm.chunks() * norm.size, norm.eps, [&](uint32_t i) -> Moments {
        const uint32_t chunk = i / norm.size, channel = i % norm.size;
        const float2 of = first[size_t(chunk) * norm.channels() + channel];
        return {double(norm.pixels_of(chunk)), double(of.x) + inputs.term(norm, image, group * norm.size + channel), of.y};
    });
    if (threadIdx.x % WARP == 0)
        statistics[image * norm.groups + group] = found;
}

template <class T, int W>
__device__ __forceinline__ void group_norm_apply(const Norm &norm, const Inputs<T> &inputs, const float2 *statistics, T *y) {
    const Place<W> place = Place<W>::reversed(norm);
    const Channels<const T> x = channels_of(norm, place, inputs.x1, inputs.x2);
    write_y<FROM_GLOBAL>(norm, inputs, place, statistics, y, [&](uint32_t pixel) { return Pack<T, W>::read(x.at(pixel)); });
}

} // namespace

RESIDENT_KERNEL(THREADS, 3, group_norm_f32, const float *x1, const float *x2, const float *gamma, const float *beta, const float *timestep,
                const uint32_t *clock, float *y, float2 *statistics, Norm norm) {
    DYNAMIC_SHARED(memory);
    const Inputs<float> inputs{x1, x2, gamma, beta, timestep, clock};
    with_pack<float>(norm, [&](auto pack) { group_norm<float, pack.value>(norm, inputs, y, statistics, memory); });
}

RESIDENT_KERNEL(THREADS, 3, group_norm_bf16, const bf16 *x1, const bf16 *x2, const float *gamma, const float *beta, const bf16 *timestep,
                const uint32_t *clock, bf16 *y, float2 *statistics, Norm norm) {
    DYNAMIC_SHARED(memory);
    const Inputs<bf16> inputs{x1, x2, gamma, beta, timestep, clock};
    with_pack<bf16>(norm, [&](auto pack) { group_norm<bf16, pack.value>(norm, inputs, y, statistics, memory); });
}

KERNEL(THREADS, group_norm_moments_f32, const float *x1, const float *x2, const float *gamma, const float *beta, const float *timestep,
       const uint32_t *clock, float2 *workspace, Norm norm) {
    DYNAMIC_SHARED(memory);
    const Inputs<float> inputs{x1, x2, gamma, beta, timestep, clock};
    with_pack<float>(norm, [&](auto pack) { group_norm_moments<float, pack.value>(norm, inputs, workspace, memory); });
}

KERNEL(THREADS, group_norm_moments_bf16, const bf16 *x1, const bf16 *x2, const float *gamma, const float *beta, const bf16 *timestep,
       const uint32_t *clock, float2 *workspace, Norm norm) {
    DYNAMIC_SHARED(memory);
    const Inputs<bf16> inputs{x1, x2, gamma, beta, timestep, clock};
    with_pack<bf16>(norm, [&](auto pack) { group_norm_moments<bf16, pack.value>(norm, inputs, workspace, memory); });
}

KERNEL(THREADS, group_norm_statistics_f32, const float *timestep, const float2 *workspace, float2 *statistics, Norm norm) {
    const Inputs<float> inputs{nullptr, nullptr, nullptr, nullptr, timestep, nullptr};
    group_norm_statistics(norm, inputs, workspace, statistics);
}

KERNEL(THREADS, group_norm_statistics_bf16, const bf16 *timestep, const float2 *workspace, float2 *statistics, Norm norm) {
    const Inputs<bf16> inputs{nullptr, nullptr, nullptr, nullptr, timestep, nullptr};
    group_norm_statistics(norm, inputs, workspace, statistics);
}

KERNEL(THREADS, group_norm_apply_f32, const float *x1, const float *x2, const float *gamma, const float *beta, const float *timestep,
       const uint32_t *clock, const float2 *statistics, float *y, Norm norm) {
    const Inputs<float> inputs{x1, x2, gamma, beta, timestep, clock};
    with_pack<float>(norm, [&](auto pack) { group_norm_apply<float, pack.value>(norm, inputs, statistics, y); });
}

KERNEL(THREADS, group_norm_apply_bf16, const bf16 *x1, const bf16 *x2, const float *gamma, const float *beta, const bf16 *timestep,
       const uint32_t *clock, const float2 *statistics, bf16 *y, Norm norm) {
    const Inputs<bf16> inputs{x1, x2, gamma, beta, timestep, clock};
    with_pack<bf16>(norm, [&](auto pack) { group_norm_apply<bf16, pack.value>(norm, inputs, statistics, y); });
}
