// How group_norm.cu and group_norm_gradient.cu cut their work into blocks, and what both of them do.
//
// A block has some channels and some pixels of an image. A thread has 16 bytes of neighbouring channels, or one channel where 16 bytes do
// not divide both C1 and C2, of every few pixels: what depends on the channel alone stays in its registers. Sums go over a thread's pixels,
// then over the block: their order depends on the shape alone.
#pragma once

#include "copy_async.cuh"
#include "pack.cuh"
#include "philox.cuh"

namespace norms {

constexpr int THREADS = 256;
constexpr uint32_t WARP = 32;
/// Pixels that a thread reads before it works on the first of them, by where from.
constexpr int FROM_CHIP = 1, FROM_GLOBAL = 4, PAIRS_FROM_GLOBAL = 2;

static_assert(THREADS % WARP == 0, "a block has whole warps");

/// The norm, and how an image is cut into blocks; `Cut::sizes` of cuda.rs.
struct Norm {
    uint32_t images, pixels, channels1, channels2;
    /// Groups, and channels of each.
    uint32_t groups, size;
    uint32_t silu;
    float eps;
    /// The norm's first column of the timestep matrix, all of them, and whether they are scales and shifts.
    uint32_t first_column, columns, scales;
    uint32_t seed_low, seed_high, layer, limit;
    float keep_scale;
    /// Neighbours of an access; channels and pixels of a block.
    uint32_t pack, tile, chunk;

    __device__ __forceinline__ uint32_t channels() const { return channels1 + channels2; }
    __device__ __forceinline__ uint32_t chunks() const { return (pixels + chunk - 1) / chunk; }
    __device__ __forceinline__ uint32_t pixels_of(uint32_t number) const {
        const uint32_t left = pixels - number * chunk;
        return left < chunk ? left : chunk;
    }
};

template <class T> struct Inputs {
    const T *x1, *x2;
    const float *gamma, *beta;
    const T *timestep;
    const uint32_t *clock;

    __device__ __forceinline__ bool has_term(const Norm &norm) const { return timestep && !norm.scales; }
    __device__ __forceinline__ float term(const Norm &norm, uint32_t image, uint32_t channel) const {
        return has_term(norm) ? column(norm, image, channel) : 0.0f;
    }

    /// 1 + scale
    __device__ __forceinline__ float factor(const Norm &norm, uint32_t image, uint32_t channel) const {
        return norm.scales ? 1.0f + column(norm, image, channel) : 1.0f;
    }
    __device__ __forceinline__ float shift(const Norm &norm, uint32_t image, uint32_t channel) const {
        return norm.scales ? column(norm, image, norm.channels() + channel) : 0.0f;
    }

  private:
    __device__ __forceinline__ float column(const Norm &norm, uint32_t image, uint32_t number) const {
        return widened(timestep[size_t(image) * norm.columns + norm.first_column + number]);
    }
};

/// What a block works on, some channels of some pixels of an image; and what a thread has of it, a pack of channels of each `rows`th pixel.
template <int W> struct Place {
    uint32_t image, first_channel, width, begin, end;
    /// Packs of a pixel, and pixels at a time.
    uint32_t columns, rows;
    uint32_t column, row;
    /// The thread's first channel and pixel. A thread that is left over has no pixel.
    uint32_t channel, start;

    __device__ __forceinline__ Place(const Norm &norm, uint32_t tile, uint32_t chunk, uint32_t image) : image(image) {
        first_channel = tile * norm.tile;
        const uint32_t left = norm.channels() - first_channel;
        width = left < norm.tile ? left : norm.tile;
        begin = chunk * norm.chunk, end = begin + norm.pixels_of(chunk);
        columns = norm.tile / W, rows = blockDim.x / columns;
        column = threadIdx.x % columns, row = threadIdx.x / columns;
        const bool is_left_over = row >= rows || W * column >= width;
        channel = first_channel + (is_left_over ? 0 : W * column);
        start = is_left_over ? end : begin + row;
    }

    /// The block's own place.
    __device__ __forceinline__ explicit Place(const Norm &norm) : Place(norm, blockIdx.x, blockIdx.y, blockIdx.z) {}

    /// Blocks in the opposite order: what an earlier pass has read last is read first, while the cache still has it.
    __device__ __forceinline__ static Place reversed(const Norm &norm) {
        return Place(norm, gridDim.x - 1 - blockIdx.x, gridDim.y - 1 - blockIdx.y, gridDim.z - 1 - blockIdx.z);
    }
};

/// A thread's channels of a tensor.
template <class T> struct Channels {
    T *first;
    size_t stride;

    __device__ __forceinline__ T *at(uint32_t pixel) const { return first + pixel * stride; }
};

/// Of a tensor that has all channels.
template <class T, int W> __device__ __forceinline__ Channels<T> channels_of(const Norm &norm, const Place<W> &place, T *tensor) {
    const size_t stride = norm.channels();
    return {tensor + size_t(place.image) * norm.pixels * stride + place.channel, stride};
}

/// Of the concatenation of two.
template <class T, int W> __device__ __forceinline__ Channels<T> channels_of(const Norm &norm, const Place<W> &place, T *one, T *two) {
    const bool is_second = place.channel >= norm.channels1;
    const size_t stride = is_second ? norm.channels2 : norm.channels1;
    T *image = (is_second ? two : one) + size_t(place.image) * norm.pixels * stride;
    return {image + place.channel - (is_second ? norm.channels1 : 0), stride};
}

/// Calls `use(pixel, load(pixel))` for the thread's pixels, `LOADS` of which it reads before it uses the first.
template <int LOADS, int W, class Load, class Use>
__device__ __forceinline__ void for_pixels(const Place<W> &place, const Load &load, const Use &use) {
    for (uint32_t first = place.start; first < place.end; first += LOADS * place.rows) {
        decltype(load(first)) loaded[LOADS] = {};
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            if (first + i * place.rows < place.end)
                loaded[i] = load(first + i * place.rows);
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            if (first + i * place.rows < place.end)
                use(first + i * place.rows, loaded[i]);
    }
}

/// A block's shared memory: slabs [chunk, tile] of T, in which a thread has its own words only; room for sums; f32 values of the channels.
/// `Cut::shared` of cuda.rs counts it.
template <class T, int W> struct Chip {
    using Word = typename Pack<T, W>::Word;
    unsigned char *memory;
    uint32_t slab_bytes;
    float *room, *values;

    __device__ __forceinline__ Chip(const Norm &norm, const Place<W> &place, unsigned char *memory, int slabs) : memory(memory) {
        slab_bytes = (norm.chunk * norm.tile * uint32_t(sizeof(T)) + 15) / 16 * 16;
        room = reinterpret_cast<float *>(memory + slabs * slab_bytes);
        const uint32_t rows = WARP % place.columns == 0 ? blockDim.x / WARP : place.rows;
        values = room + rows * norm.tile;
    }

    __device__ __forceinline__ Word *at(int slab, const Place<W> &place, uint32_t pixel) const {
        return reinterpret_cast<Word *>(memory + slab * slab_bytes) + (pixel - place.begin) * place.columns + place.column;
    }

    /// Begins to copy the block's part of a tensor.
    __device__ __forceinline__ void fill(int slab, const Place<W> &place, const Channels<const T> &from) const {
        for (uint32_t pixel = place.start; pixel < place.end; pixel += place.rows)
            copy_async(at(slab, place, pixel), reinterpret_cast<const Word *>(from.at(pixel)));
    }
};

/// Sums over all threads that have the same channel, times a factor: `sums` of the block's channels, in shared or global memory, for all
/// threads to read.
template <int W>
__device__ __forceinline__ void sum_pixels(const Place<W> &place, float (&values)[W], float *room, float factor, float *sums) {
    const uint32_t tile = W * place.columns;
    uint32_t row = place.row, rows = place.rows;
    bool writes = row < rows;
    if (WARP % place.columns == 0) {
        // A column's lanes of a warp are as far from each other as there are columns.
        for (uint32_t lanes = WARP / 2; lanes >= place.columns; lanes /= 2)
#pragma unroll
            for (int i = 0; i < W; i++)
                values[i] += __shfl_xor_sync(~0u, values[i], lanes);
        row = threadIdx.x / WARP, rows = blockDim.x / WARP;
        writes = threadIdx.x % WARP < place.columns;
    }
    if (writes)
#pragma unroll
        for (int i = 0; i < W; i++)
            room[row * tile + W * place.column + i] = values[i];
    __syncthreads();
    const uint32_t parts = blockDim.x / tile;
    if (rows > WARP && parts > 1) {
        // Many rows: first some of them to each thread.
        const uint32_t part = threadIdx.x / tile, channel = threadIdx.x % tile;
        float sum = 0.0f;
        if (part < parts)
            for (uint32_t r = part; r < rows; r += parts)
                sum += room[r * tile + channel];
        __syncthreads();
        if (part < parts)
            room[part * tile + channel] = sum;
        __syncthreads();
        rows = parts;
    }
    for (uint32_t channel = threadIdx.x; channel < place.width; channel += blockDim.x) {
        float sum = 0.0f;
        for (uint32_t r = 0; r < rows; r++)
            sum += room[r * tile + channel];
        sums[channel] = factor * sum;
    }
    __syncthreads();
}

/// Calls `each(group)` with a warp for each group of the block's channels.
template <int W, class F> __device__ __forceinline__ void for_groups(const Norm &norm, const Place<W> &place, const F &each) {
    const uint32_t end = (place.first_channel + place.width) / norm.size;
    for (uint32_t group = place.first_channel / norm.size + threadIdx.x / WARP; group < end; group += blockDim.x / WARP)
        each(group);
}

/// What normalises a thread's channels, with the timestep's scale and shift in it: z = (x - center) scale + bias.
template <int W> struct Affine {
    float center[W], scale[W], bias[W];

    template <class T>
    __device__ __forceinline__ Affine(const Norm &norm, const Inputs<T> &inputs, const Place<W> &place, const float2 *statistics) {
#pragma unroll
        for (int i = 0; i < W; i++) {
            const uint32_t channel = place.channel + i;
            const float2 of_group = statistics[place.image * norm.groups + channel / norm.size];
            center[i] = of_group.x - inputs.term(norm, place.image, channel);
            scale[i] = inputs.gamma[channel] * of_group.y;
            bias[i] = inputs.beta[channel];
            if (norm.scales) {
                const float factor = inputs.factor(norm, place.image, channel);
                scale[i] *= factor, bias[i] = bias[i] * factor + inputs.shift(norm, place.image, channel);
            }
        }
    }

    __device__ __forceinline__ float z(float x, int i) const { return (x - center[i]) * scale[i] + bias[i]; }
};

/// In bf16 by quick functions, a few units of f32's last place off.
template <class T> __device__ __forceinline__ float sigmoid(float z) {
    return sizeof(T) == 4 ? 1.0f / (1.0f + expf(-z)) : __fdividef(1.0f, 1.0f + __expf(-z));
}

/// The mask of an image: an element is kept, and scaled, where its random bits are at most `limit`.
struct Dropout {
    rng::Stream stream;
    uint32_t limit;
    float scale;
    bool is_drawn;

    __device__ __forceinline__ Dropout(const Norm &norm, const uint32_t *clock, uint32_t image) : limit(norm.limit), is_drawn(clock) {
        const uint32_t step = clock ? clock[0] : 0, sample = clock ? clock[1] + image : 0;
        stream = rng::stream(uint64_t(norm.seed_high) << 32 | norm.seed_low, rng::DROPOUT, norm.layer, sample, step);
        scale = clock ? norm.keep_scale : 1.0f;
    }

    /// Puts zeros where elements are dropped: those from `first` on, counted in NHWC.
    template <int W> __device__ __forceinline__ void drop(float (&values)[W], uint64_t first) const {
        static_assert(W == 1 || W % 4 == 0);
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            const uint4 four = rng::words(stream, uint32_t(first / 4) + i / 4);
            const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
            if constexpr (W == 1) {
                const uint32_t mine = first % 4 == 0 ? four.x : first % 4 == 1 ? four.y : first % 4 == 2 ? four.z : four.w;
                values[0] = mine <= limit ? values[0] : 0.0f;
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    values[i + k] = bits[k] <= limit ? values[i + k] : 0.0f;
            }
        }
    }
};

/// A number that the compiler knows.
template <int N> struct Number {
    static constexpr int value = N;
};

/// Calls `run` with the number of neighbours of an access.
template <class T, class F> __device__ __forceinline__ void with_pack(const Norm &norm, const F &run) {
    if (norm.pack == 1)
        run(Number<1>{});
    else
        run(Number<Pack<T>::SIZE>{});
}

} // namespace norms
