// The gradients of group_norm.cu (src/ops/group_norm). x1 to clock are the norm's; masks are drawn again.
//
//   dy               T   [N, H, W, C]
//   statistics       f32 [N, groups, 2], as the norm wrote them
//   dx1, dx2         T   [N, H, W, C1], [N, H, W, C2] (+)=, each for itself
//   d_timestep       T   [N, columns], the norm's C columns, 2 C with `scales`, =, the others stay as they are; null where there is none
//   d_gamma, d_beta  f32 [C] (+)=
//   workspace        f32: each image's part of d_gamma and d_beta [N, 2, C], coefficients [N, groups, 2], and sums [N, chunks, 3, C] where
//                    there are two passes
//
// Buffers are aligned to 16 bytes. group_norm_gradient: a block holds all pixels of some whole groups of x and dy in shared memory, and
// moves 3 N H W C sizeof T bytes. Where that does not fit there are two passes: group_norm_gradient_sums over chunks of pixels,
// group_norm_gradient_coefficients of the groups, group_norm_gradient_apply writes dx; 5 parts are moved. One more where dx is added to.
// group_norm_parameters adds up d_gamma and d_beta over the images in a fixed order.
//
// Computes 35 FLOPs an element, two exponentials with SiLU, and with dropout 10 Philox rounds for 4 elements, twice in two passes.

#include "group_norm.cuh"
#include "reduce.cuh"

namespace {

using namespace norms;

/// What the gradient has beside its inputs: dy, the norm's statistics, and a workspace.
template <class T> struct Backward {
    const T *dy;
    const float2 *statistics;
    /// f32 [N, 2, C], each image's part of d_gamma and d_beta.
    float *parameters;
    /// [N, groups] of slope and offset: dx = scale dz - slope (x - center) - offset.
    float2 *coefficients;
    /// f32 [N, chunks, 3, C] where there are two passes: sums over a chunk's pixels of dz, dz (x - center), and x - center.
    float *sums;

    __device__ __forceinline__ Backward(const Norm &norm, const T *dy, const float2 *statistics, float *workspace)
        : dy(dy), statistics(statistics), parameters(workspace) {
        float *const end = workspace + size_t(norm.images) * 2 * norm.channels();
        coefficients = reinterpret_cast<float2 *>(end);
        sums = end + size_t(norm.images) * 2 * norm.groups;
    }
};

/// Words of x and dy, and of dx where that is added to.
template <class Word> struct Operands {
    Word x, dy, dx;
};

/// Gives x and dy of a pixel from global memory.
template <class T, int W> struct FromGlobal {
    Channels<const T> x, dy;

    __device__ __forceinline__ FromGlobal(const Norm &norm, const Inputs<T> &inputs, const Backward<T> &backward, const Place<W> &place)
        : x(channels_of(norm, place, inputs.x1, inputs.x2)), dy(channels_of(norm, place, backward.dy)) {}

    __device__ __forceinline__ Operands<typename Pack<T, W>::Word> operator()(uint32_t pixel) const {
        return {Pack<T, W>::read(x.at(pixel)), Pack<T, W>::read(dy.at(pixel)), {}};
    }
};

/// dz, the gradient with respect to z: dy, which has the mask's zeros, times its scale and SiLU'.
template <class T, int W>
__device__ __forceinline__ void to_dz(float (&dy)[W], const float (&x)[W], const Affine<W> &affine, float scale, bool silu) {
    if (silu)
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float z = affine.z(x[i], i), s = sigmoid<T>(z);
            dy[i] *= s * (1.0f + z * (1.0f - s));
        }
#pragma unroll
    for (int i = 0; i < W; i++)
        dy[i] *= scale;
}

/// The block's sums, each `stride` after the one before it. `load` gives the operands; dy has the mask's zeros already, or DRAWS.
template <int LOADS, bool DRAWS, class T, int W, class F>
__device__ __forceinline__ void sum_gradients(const Norm &norm, const Inputs<T> &inputs, const Place<W> &place, const Affine<W> &affine,
                                              const Dropout &dropout, float *room, float *sums, uint32_t stride, const F &load) {
    float sum_dz[W] = {}, sum_dz_x[W] = {}, sum_x[W] = {};
    const bool silu = norm.silu;
    for_pixels<LOADS>(place, load, [&](uint32_t pixel, auto words) {
        const auto x = Pack<T, W>::of(words.x);
        auto dz = Pack<T, W>::of(words.dy);
        if (DRAWS && dropout.is_drawn)
            dropout.drop(dz.values, uint64_t(pixel) * norm.channels() + place.channel);
        to_dz<T>(dz.values, x.values, affine, dropout.scale, silu);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float d = x.values[i] - affine.center[i];
            sum_dz[i] += dz.values[i], sum_dz_x[i] += dz.values[i] * d, sum_x[i] += d;
        }
    });
    sum_pixels(place, sum_dz, room, 1.0f, sums);
    sum_pixels(place, sum_dz_x, room, 1.0f, sums + stride);
    if (inputs.has_term(norm))
        sum_pixels(place, sum_x, room, 1.0f, sums + 2 * stride);
}

/// What follows from a group's sums, by one warp. With M elements and gain = gamma (1 + scale) dx = rstd (gain dz - sum(gain dz)/M -
/// xhat sum(gain dz xhat)/M), which is added up over the pixels where d_timestep is a term's. `sums` [3, tile]: those of the block's
/// channels.
template <class T, int W>
__device__ __forceinline__ void finish_group(const Norm &norm, const Inputs<T> &inputs, const Backward<T> &backward, const Place<W> &place,
                                             uint32_t group, const float *sums, T *d_timestep) {
    const uint32_t first = group * norm.size, lane = threadIdx.x % WARP;
    const size_t number = size_t(place.image) * norm.groups + group;
    const double rstd = backward.statistics[number].y, elements = double(norm.size) * norm.pixels;
    const float *const of_dz = sums + first - place.first_channel, *const of_dz_x = of_dz + norm.tile, *const of_x = of_dz_x + norm.tile;
    double sum_dz = 0.0, sum_dz_x = 0.0;
    for (uint32_t i = lane; i < norm.size; i += WARP) {
        const double gain = double(inputs.gamma[first + i]) * inputs.factor(norm, place.image, first + i);
        sum_dz += gain * of_dz[i], sum_dz_x += gain * of_dz_x[i];
    }
    const double mean_dz = warp_sum(sum_dz) / elements, mean_dz_x = rstd * warp_sum(sum_dz_x) / elements;
    if (lane == 0)
        backward.coefficients[number] = make_float2(float(rstd * rstd * mean_dz_x), float(rstd * mean_dz));
    float *const d_gamma = backward.parameters + size_t(place.image) * 2 * norm.channels() + first;
    float *const d_beta = d_gamma + norm.channels();
    for (uint32_t i = lane; i < norm.size; i += WARP) {
        const double factor = inputs.factor(norm, place.image, first + i);
        d_gamma[i] = float(factor * (rstd * of_dz_x[i])), d_beta[i] = float(factor * of_dz[i]);
        if (!d_timestep)
            continue;
        const double gamma = inputs.gamma[first + i];
        T *const columns = d_timestep + size_t(place.image) * norm.columns + norm.first_column + first + i;
        if (norm.scales) {
            columns[0] = rounded<T>(float(gamma * (rstd * of_dz_x[i]) + double(inputs.beta[first + i]) * of_dz[i]));
            columns[norm.channels()] = rounded<T>(of_dz[i]);
        } else {
            const double sum = gamma * of_dz[i] - norm.pixels * mean_dz - of_x[i] * rstd * mean_dz_x;
            columns[0] = rounded<T>(float(rstd * sum));
        }
    }
}

/// dx1 and dx2, and whether they are added to.
template <class T> struct Gradients {
    T *dx1, *dx2;
    uint32_t adds1, adds2;
};

/// dx of the thread's pixels; `load` and DRAWS as for the sums.
template <int LOADS, bool DRAWS, class T, int W, class F>
__device__ __forceinline__ void write_dx(const Norm &norm, const Place<W> &place, const Affine<W> &affine, const Dropout &dropout,
                                         const float2 *coefficients, const Gradients<T> &gradients, const F &load) {
    float slope[W], offset[W];
#pragma unroll
    for (int i = 0; i < W; i++) {
        const float2 of_group = coefficients[place.image * norm.groups + (place.channel + i) / norm.size];
        slope[i] = of_group.x, offset[i] = of_group.y;
    }
    const Channels<T> to = channels_of(norm, place, gradients.dx1, gradients.dx2);
    const bool silu = norm.silu, adds = place.channel < norm.channels1 ? gradients.adds1 : gradients.adds2;
    const auto load_all = [&](uint32_t pixel) {
        auto words = load(pixel);
        if (adds)
            words.dx = Pack<T, W>::read(to.at(pixel));
        return words;
    };
    for_pixels<LOADS>(place, load_all, [&](uint32_t pixel, auto words) {
        const auto x = Pack<T, W>::of(words.x);
        auto pack = Pack<T, W>::of(words.dy);
        if (DRAWS && dropout.is_drawn)
            dropout.drop(pack.values, uint64_t(pixel) * norm.channels() + place.channel);
        to_dz<T>(pack.values, x.values, affine, dropout.scale, silu);
#pragma unroll
        for (int i = 0; i < W; i++)
            pack.values[i] = pack.values[i] * affine.scale[i] - (x.values[i] - affine.center[i]) * slope[i] - offset[i];
        if (adds) {
            const auto before = Pack<T, W>::of(words.dx);
#pragma unroll
            for (int i = 0; i < W; i++)
                pack.values[i] += before.values[i];
        }
        pack.store(to.at(pixel));
    });
}

template <class T, int W>
__device__ __forceinline__ void group_norm_gradient(const Norm &norm, const Inputs<T> &inputs, const Backward<T> &backward,
                                                    const Gradients<T> &gradients, T *d_timestep, unsigned char *memory) {
    using Word = typename Pack<T, W>::Word;
    const Place<W> place(norm);
    const Chip<T, W> chip(norm, place, memory, 2);
    chip.fill(0, place, channels_of(norm, place, inputs.x1, inputs.x2));
    chip.fill(1, place, channels_of(norm, place, backward.dy));
    const Dropout dropout(norm, inputs.clock, place.image);
    wait_for_copies();
    if (dropout.is_drawn)
        for_pixels<FROM_CHIP>(place, [&](uint32_t pixel) { return *chip.at(1, place, pixel); }, [&](uint32_t pixel, Word word) {
            auto dy = Pack<T, W>::of(word);
            dropout.drop(dy.values, uint64_t(pixel) * norm.channels() + place.channel);
            *chip.at(1, place, pixel) = dy.word();
        });
    const Affine<W> affine(norm, inputs, place, backward.statistics);
    const auto load = [&](uint32_t pixel) -> Operands<Word> { return {*chip.at(0, place, pixel), *chip.at(1, place, pixel), {}}; };
    sum_gradients<FROM_CHIP, false>(norm, inputs, place, affine, dropout, chip.room, chip.values, norm.tile, load);
    for_groups(norm, place, [&](uint32_t group) { finish_group(norm, inputs, backward, place, group, chip.values, d_timestep); });
    __syncthreads();
    write_dx<FROM_CHIP, false>(norm, place, affine, dropout, backward.coefficients, gradients, load);
}

template <class T, int W>
__device__ __forceinline__ void group_norm_gradient_sums(const Norm &norm, const Inputs<T> &inputs, const Backward<T> &backward,
                                                         unsigned char *memory) {
    const Place<W> place(norm);
    const Chip<T, W> chip(norm, place, memory, 0);
    const Affine<W> affine(norm, inputs, place, backward.statistics);
    const Dropout dropout(norm, inputs.clock, place.image);
    const FromGlobal<T, W> load(norm, inputs, backward, place);
    float *const sums = backward.sums + (size_t(place.image) * gridDim.y + blockIdx.y) * 3 * norm.channels() + place.first_channel;
    sum_gradients<PAIRS_FROM_GLOBAL, true>(norm, inputs, place, affine, dropout, chip.room, sums, norm.channels(), load);
}

/// A block for some whole groups of an image: adds up the chunks.
template <class T>
__device__ __forceinline__ void group_norm_gradient_coefficients(const Norm &norm, const Inputs<T> &inputs, const Backward<T> &backward,
                                                                 T *d_timestep, unsigned char *memory) {
    const Place<1> place(norm, blockIdx.x, 0, blockIdx.y);
    float *const sums = reinterpret_cast<float *>(memory);
    const uint32_t kinds = inputs.has_term(norm) ? 3 : 2, chunks = norm.chunks();
    for (uint32_t i = threadIdx.x; i < kinds * place.width; i += blockDim.x) {
        const uint32_t kind = i / place.width, channel = i % place.width;
        const float *const of_image = backward.sums + size_t(place.image) * chunks * 3 * norm.channels();
        const float *const from = of_image + kind * norm.channels() + place.first_channel + channel;
        double sum = 0.0;
#pragma unroll 8
        for (uint32_t chunk = 0; chunk < chunks; chunk++)
            sum += from[size_t(chunk) * 3 * norm.channels()];
        sums[kind * norm.tile + channel] = float(sum);
    }
    __syncthreads();
    for_groups(norm, place, [&](uint32_t group) { finish_group(norm, inputs, backward, place, group, sums, d_timestep); });
}

template <class T, int W>
__device__ __forceinline__ void group_norm_gradient_apply(const Norm &norm, const Inputs<T> &inputs, const Backward<T> &backward,
                                                          const Gradients<T> &gradients) {
    const Place<W> place = Place<W>::reversed(norm);
    const Affine<W> affine(norm, inputs, place, backward.statistics);
    const Dropout dropout(norm, inputs.clock, place.image);
    const FromGlobal<T, W> load(norm, inputs, backward, place);
    write_dx<PAIRS_FROM_GLOBAL, true>(norm, place, affine, dropout, backward.coefficients, gradients, load);
}

} // namespace

RESIDENT_KERNEL(THREADS, 3, group_norm_gradient_f32, const float *x1, const float *x2, const float *gamma, const float *beta,
                const float *timestep, const uint32_t *clock, const float *dy, const float2 *statistics, float *dx1, float *dx2,
                float *d_timestep, float *workspace, Norm norm, uint32_t adds1, uint32_t adds2) {
    DYNAMIC_SHARED(memory);
    const Inputs<float> inputs{x1, x2, gamma, beta, timestep, clock};
    const Backward<float> backward(norm, dy, statistics, workspace);
    const Gradients<float> gradients{dx1, dx2, adds1, adds2};
    with_pack<float>(norm, [&](auto pack) {
        group_norm_gradient<float, pack.value>(norm, inputs, backward, gradients, d_timestep, memory);
    });
}

RESIDENT_KERNEL(THREADS, 2, group_norm_gradient_bf16, const bf16 *x1, const bf16 *x2, const float *gamma, const float *beta,
                const bf16 *timestep, const uint32_t *clock, const bf16 *dy, const float2 *statistics, bf16 *dx1, bf16 *dx2,
                bf16 *d_timestep, float *workspace, Norm norm, uint32_t adds1, uint32_t adds2) {
    DYNAMIC_SHARED(memory);
    const Inputs<bf16> inputs{x1, x2, gamma, beta, timestep, clock};
    const Backward<bf16> backward(norm, dy, statistics, workspace);
    const Gradients<bf16> gradients{dx1, dx2, adds1, adds2};
    with_pack<bf16>(norm, [&](auto pack) {
        group_norm_gradient<bf16, pack.value>(norm, inputs, backward, gradients, d_timestep, memory);
    });
}

KERNEL(THREADS, group_norm_gradient_sums_f32, const float *x1, const float *x2, const float *gamma, const float *beta,
       const float *timestep, const uint32_t *clock, const float *dy, const float2 *statistics, float *workspace, Norm norm) {
    DYNAMIC_SHARED(memory);
    const Inputs<float> inputs{x1, x2, gamma, beta, timestep, clock};
    const Backward<float> backward(norm, dy, statistics, workspace);
    with_pack<float>(norm, [&](auto pack) { group_norm_gradient_sums<float, pack.value>(norm, inputs, backward, memory); });
}

KERNEL(THREADS, group_norm_gradient_sums_bf16, const bf16 *x1, const bf16 *x2, const float *gamma, const float *beta, const bf16 *timestep,
       const uint32_t *clock, const bf16 *dy, const float2 *statistics, float *workspace, Norm norm) {
    DYNAMIC_SHARED(memory);
    const Inputs<bf16> inputs{x1, x2, gamma, beta, timestep, clock};
    const Backward<bf16> backward(norm, dy, statistics, workspace);
    with_pack<bf16>(norm, [&](auto pack) { group_norm_gradient_sums<bf16, pack.value>(norm, inputs, backward, memory); });
}

RESIDENT_KERNEL(THREADS, 4, group_norm_gradient_coefficients_f32, const float *gamma, const float *beta, const float *timestep,
                const float2 *statistics, float *d_timestep, float *workspace, Norm norm) {
    DYNAMIC_SHARED(memory);
    const Inputs<float> inputs{nullptr, nullptr, gamma, beta, timestep, nullptr};
    const Backward<float> backward(norm, nullptr, statistics, workspace);
    group_norm_gradient_coefficients(norm, inputs, backward, d_timestep, memory);
}

RESIDENT_KERNEL(THREADS, 4, group_norm_gradient_coefficients_bf16, const float *gamma, const float *beta, const bf16 *timestep,
                const float2 *statistics, bf16 *d_timestep, float *workspace, Norm norm) {
    DYNAMIC_SHARED(memory);
    const Inputs<bf16> inputs{nullptr, nullptr, gamma, beta, timestep, nullptr};
    const Backward<bf16> backward(norm, nullptr, statistics, workspace);
    group_norm_gradient_coefficients(norm, inputs, backward, d_timestep, memory);
}

KERNEL(THREADS, group_norm_gradient_apply_f32, const float *x1, const float *x2, const float *gamma, const float *beta,
       const float *timestep, const uint32_t *clock, const float *dy, const float2 *statistics, float *dx1, float *dx2, float *workspace,
       Norm norm, uint32_t adds1, uint32_t adds2) {
    const Inputs<float> inputs{x1, x2, gamma, beta, timestep, clock};
    const Backward<float> backward(norm, dy, statistics, workspace);
    const Gradients<float> gradients{dx1, dx2, adds1, adds2};
    with_pack<float>(norm, [&](auto pack) { group_norm_gradient_apply<float, pack.value>(norm, inputs, backward, gradients); });
}

KERNEL(THREADS, group_norm_gradient_apply_bf16, const bf16 *x1, const bf16 *x2, const float *gamma, const float *beta, const bf16 *timestep,
       const uint32_t *clock, const bf16 *dy, const float2 *statistics, bf16 *dx1, bf16 *dx2, float *workspace, Norm norm, uint32_t adds1,
       uint32_t adds2) {
    const Inputs<bf16> inputs{x1, x2, gamma, beta, timestep, clock};
    const Backward<bf16> backward(norm, dy, statistics, workspace);
    const Gradients<bf16> gradients{dx1, dx2, adds1, adds2};
    with_pack<bf16>(norm, [&](auto pack) { group_norm_gradient_apply<bf16, pack.value>(norm, inputs, backward, gradients); });
}

// A warp for each 8th image, a lane for each of 32 of the 2 C parameters, in f64.
KERNEL(THREADS, group_norm_parameters, const float *workspace, float *d_gamma, float *d_beta, uint32_t images, uint32_t channels,
       uint32_t adds_gamma, uint32_t adds_beta) {
    constexpr uint32_t WARPS = THREADS / WARP;
    SHARED(double, partials, THREADS);
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, parameter = blockIdx.x * WARP + lane;
    double sum = 0.0;
    if (parameter < 2 * channels)
#pragma unroll 8
        for (uint32_t image = warp; image < images; image += WARPS)
            sum += workspace[size_t(image) * 2 * channels + parameter];
    partials[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || parameter >= 2 * channels)
        return;
    for (uint32_t other = 1; other < WARPS; other++)
        sum += partials[other * WARP + lane];
    const bool is_gamma = parameter < channels;
    float *const to = is_gamma ? d_gamma + parameter : d_beta + parameter - channels;
    *to = float((is_gamma ? adds_gamma : adds_beta) ? *to + sum : sum);
}
