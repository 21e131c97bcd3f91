// Self-attention without tensor cores: f32, which stays f32 throughout, and the bf16 heads that attention.cu does not take (channels that
// are no multiple of 8, or more than 512). Operands, results and formulas are those of attention.cu, in f32 or bf16 where it has bf16; here
// too is attention_dots, which both need:
//
//   dots       f32 [N, heads, T] =, the sums of o d_o over a head's channels: a warp for each
//
// A block has 32 rows (queries, or keys for d_k and d_v) and goes through tiles of 32 others, in order: equal inputs give equal bits.
// Scores are summed over 32 channels at a time, so that a head may have any number of them. The sums of the result stand in shared memory,
// those of 512 channels at most; heads of more have a block along y for each 512. Probabilities are f32 and of base e, as on the CPU.
//
// Grid: tiles x heads x N, parts of a head. Computes 4 N T^2 C FLOPs forward and 14 backward, and scores again for each part of a head.
// Moves what attention.cu moves, in its type.

#include "attention.cuh"

namespace {

constexpr int THREADS = 256;
/// Rows of a tile, tokens of another, and channels at a time.
constexpr int TILE = 32;
/// Rows of a warp.
constexpr int ROWS = TILE / (THREADS / 32);
/// Channels of a result that a block computes.
constexpr int SLICE = 512;
/// Rows of a tile begin on 16 bytes, eight of them in different banks.
constexpr int PITCH = TILE + 4;
using Tile = float[TILE][PITCH];

/// The channels of the result that a block computes.
struct Slice {
    int first, count;

    /// Elements of a row of sums.
    __device__ __forceinline__ int pitch() const { return (count + TILE - 1) / TILE * TILE; }
};

__device__ __forceinline__ Slice slice_of(const Attention &sizes) {
    const int first = blockIdx.y * SLICE, left = static_cast<int>(sizes.channels) - first;
    return {first, left < SLICE ? left : SLICE};
}

/// Four neighbours, of which `left` are there and the rest zeros.
template <class T> __device__ __forceinline__ float4 load_four(const T *from, int left) {
    return make_float4(left > 0 ? widened(from[0]) : 0.0f, left > 1 ? widened(from[1]) : 0.0f, left > 2 ? widened(from[2]) : 0.0f,
                       left > 3 ? widened(from[3]) : 0.0f);
}

/// TILE channels of TILE rows that stand `stride` apart; from `rows` rows and `channels` channels on there are zeros.
template <class T> __device__ __forceinline__ void load(Tile &tile, const T *from, size_t stride, int rows, int channels) {
    const int row = threadIdx.x / 8, channel = threadIdx.x % 8 * 4;
    from += row * stride + channel;
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row < rows) {
        if (sizeof(T) == 4 && channel + 4 <= channels && reinterpret_cast<uintptr_t>(from) % 16 == 0)
            four = *reinterpret_cast<const float4 *>(from);
        else
            four = load_four(from, channels - channel);
    }
    *reinterpret_cast<float4 *>(&tile[row][channel]) = four;
}

/// A thread's scores: rows y and y + 16 with columns x and x + 16, x = threadIdx.x % 16, y = threadIdx.x / 16.
struct Scores {
    float of[2][2];
};
__device__ __forceinline__ int row_of(int i) { return threadIdx.x / 16 + 16 * i; }
__device__ __forceinline__ int column_of(int j) { return threadIdx.x % 16 + 16 * j; }

/// a b' of two tiles of rows of `channels`.
template <class T>
__device__ __forceinline__ Scores score(Tile &left, Tile &right, const T *a, size_t a_stride, int a_rows, const T *b, size_t b_stride,
                                        int b_rows, int channels) {
    Scores sum = {};
#pragma unroll 1
    for (int first = 0; first < channels; first += TILE) {
        load(left, a + first, a_stride, a_rows, channels - first);
        load(right, b + first, b_stride, b_rows, channels - first);
        __syncthreads();
// More would spill.
#pragma unroll 2
        for (int channel = 0; channel < TILE; channel += 4) {
            float4 rows[2], columns[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                rows[i] = *reinterpret_cast<const float4 *>(&left[row_of(i)][channel]);
                columns[i] = *reinterpret_cast<const float4 *>(&right[column_of(i)][channel]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &s = sum.of[i][j];
                    s = __fmaf_rn(rows[i].x, columns[j].x, s);
                    s = __fmaf_rn(rows[i].y, columns[j].y, s);
                    s = __fmaf_rn(rows[i].z, columns[j].z, s);
                    s = __fmaf_rn(rows[i].w, columns[j].w, s);
                }
        }
        __syncthreads();
    }
    return sum;
}

/// sums = factors sums + p b, for the warp's rows: lane l has every 32nd channel of the slice from l on. At first there are no sums. Begins
/// and ends with a barrier.
template <class T>
__device__ __forceinline__ void weigh(float *sums, bool is_first, const float (&factors)[ROWS], const Tile &p, Tile &tile, const T *b,
                                      size_t stride, int rows, const Slice &slice) {
    const int row = threadIdx.x / 32 * ROWS, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < slice.count; first += TILE) {
        __syncthreads();
        load(tile, b + slice.first + first, stride, rows, slice.count - first);
        __syncthreads();
        float *of_lane = sums + row * slice.pitch() + first + lane;
        float sum[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            sum[r] = is_first ? 0.0f : of_lane[r * slice.pitch()] * factors[r];
// More would spill.
#pragma unroll 2
        for (int token = 0; token < TILE; token += 4) {
            const float values[4] = {tile[token][lane], tile[token + 1][lane], tile[token + 2][lane], tile[token + 3][lane]};
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float4 weights = *reinterpret_cast<const float4 *>(&p[row + r][token]);
                sum[r] = __fmaf_rn(weights.x, values[0], sum[r]);
                sum[r] = __fmaf_rn(weights.y, values[1], sum[r]);
                sum[r] = __fmaf_rn(weights.z, values[2], sum[r]);
                sum[r] = __fmaf_rn(weights.w, values[3], sum[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            of_lane[r * slice.pitch()] = sum[r];
    }
    __syncthreads();
}

/// Writes or adds the warp's sums, times a factor for each row.
template <class T>
__device__ __forceinline__ void store(const float *sums, const float (&factors)[ROWS], T *to, size_t stride, int rows, const Slice &slice,
                                      bool adds) {
    const int row = threadIdx.x / 32 * ROWS, lane = threadIdx.x % 32;
    for (int r = 0; r < ROWS && row + r < rows; r++)
        for (int channel = lane; channel < slice.count; channel += 32) {
            T &place = to[(row + r) * stride + slice.first + channel];
            const float value = sums[(row + r) * slice.pitch() + channel] * factors[r];
            place = rounded<T>(adds ? widened(place) + value : value);
        }
}

/// Over the lanes of a warp.
__device__ __forceinline__ float sum_of(float value) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2)
        value += __shfl_xor_sync(~0u, value, bits);
    return value;
}
__device__ __forceinline__ float maximum_of(float value) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2)
        value = fmaxf(value, __shfl_xor_sync(~0u, value, bits));
    return value;
}

template <class T> __device__ __forceinline__ void forward(const T *qkv, T *o, float *log_sums, const Attention &sizes, float scale) {
    SHARED(Tile, tiles, 3);
    DYNAMIC_SHARED(shared);
    float *sums = reinterpret_cast<float *>(shared);
    Tile &p = tiles[2];
    const Part part(sizes, TILE, blockIdx.x);
    const Slice slice = slice_of(sizes);
    const int tokens = sizes.tokens, channels = sizes.channels;
    const size_t wide = sizes.wide(), width = sizes.width();
    const T *all_q = qkv + part.qkv, *all_k = all_q + width, *all_v = all_k + width;
    const int row = threadIdx.x / 32 * ROWS, lane = threadIdx.x % 32;

    float maxima[ROWS], totals[ROWS], factors[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        maxima[r] = -INFINITY, totals[r] = 0.0f;
    for (int first = 0; first < tokens; first += TILE) {
        const int left = tokens - first;
        const Scores s = score(tiles[0], tiles[1], all_q + part.first * wide, wide, part.left, all_k + first * wide, wide, left, channels);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                p[row_of(i)][column_of(j)] = column_of(j) < left ? s.of[i][j] * scale : -INFINITY;
        __syncthreads();
        // A lane has a key.
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float score = p[row + r][lane], higher = fmaxf(maxima[r], maximum_of(score));
            const float probability = expf(score - higher);
            factors[r] = expf(maxima[r] - higher);
            totals[r] = totals[r] * factors[r] + sum_of(probability);
            maxima[r] = higher;
            p[row + r][lane] = probability;
        }
        weigh(sums, first == 0, factors, p, tiles[1], all_v + first * wide, wide, left, slice);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (lane == 0 && slice.first == 0 && row + r < part.left)
            log_sums[part.row + part.first + row + r] = maxima[r] + logf(totals[r]);
        factors[r] = 1.0f / totals[r];
    }
    store(sums, factors, o + part.o + part.first * width, width, part.left, slice, false);
}

/// p, and d_s = p (d_p - dot), of a query that is there.
struct Gradient {
    float p, d_s;
};
__device__ __forceinline__ Gradient gradient_of(float s, float d_p, float scale, const float *log_sums, const float *dots, size_t query) {
    const float p = expf(s * scale - log_sums[query]);
    return {p, p * (d_p - dots[query])};
}

template <class T>
__device__ __forceinline__ void gradient_of_q(const T *qkv, const float *log_sums, const T *d_o, const float *dots, T *d_qkv,
                                              const Attention &sizes, float scale, bool adds) {
    SHARED(Tile, tiles, 3);
    DYNAMIC_SHARED(shared);
    float *sums = reinterpret_cast<float *>(shared);
    const Part part(sizes, TILE, blockIdx.x);
    const Slice slice = slice_of(sizes);
    const int tokens = sizes.tokens, channels = sizes.channels;
    const size_t wide = sizes.wide(), width = sizes.width();
    const T *own = qkv + part.qkv + part.first * wide, *d_own = d_o + part.o + part.first * width;
    const T *all_k = qkv + part.qkv + width, *all_v = all_k + width;

    const float ones[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f}, scales[ROWS] = {scale, scale, scale, scale};
    for (int first = 0; first < tokens; first += TILE) {
        const int left = tokens - first;
        const Scores s = score(tiles[0], tiles[1], own, wide, part.left, all_k + first * wide, wide, left, channels);
        const Scores d_p = score(tiles[0], tiles[1], d_own, width, part.left, all_v + first * wide, wide, left, channels);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const bool is_there = row_of(i) < part.left && column_of(j) < left;
                const size_t query = part.row + part.first + row_of(i);
                const float d_s = is_there ? gradient_of(s.of[i][j], d_p.of[i][j], scale, log_sums, dots, query).d_s : 0.0f;
                tiles[2][row_of(i)][column_of(j)] = d_s;
            }
        weigh(sums, first == 0, ones, tiles[2], tiles[1], all_k + first * wide, wide, left, slice);
    }
    store(sums, scales, d_qkv + part.qkv + part.first * wide, wide, part.left, slice, adds);
}

template <class T>
__device__ __forceinline__ void gradient_of_k_and_v(const T *qkv, const float *log_sums, const T *d_o, const float *dots, T *d_qkv,
                                                    const Attention &sizes, float scale, bool adds) {
    SHARED(Tile, tiles, 4);
    DYNAMIC_SHARED(shared);
    const Part part(sizes, TILE, blockIdx.x);
    const Slice slice = slice_of(sizes);
    float *of_k = reinterpret_cast<float *>(shared), *of_v = of_k + TILE * slice.pitch();
    const int tokens = sizes.tokens, channels = sizes.channels;
    const size_t wide = sizes.wide(), width = sizes.width();
    const T *all_q = qkv + part.qkv, *all_d_o = d_o + part.o;
    const T *k = all_q + width + part.first * wide, *v = k + width;

    const float ones[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f}, scales[ROWS] = {scale, scale, scale, scale};
    for (int first = 0; first < tokens; first += TILE) {
        const int left = tokens - first;
        const T *q = all_q + first * wide, *d_other = all_d_o + first * width;
        const Scores s = score(tiles[0], tiles[1], k, wide, part.left, q, wide, left, channels);
        const Scores d_p = score(tiles[0], tiles[1], v, wide, part.left, d_other, width, left, channels);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                Gradient found = {0.0f, 0.0f};
                if (row_of(i) < part.left && column_of(j) < left)
                    found = gradient_of(s.of[i][j], d_p.of[i][j], scale, log_sums, dots, part.row + first + column_of(j));
                tiles[2][row_of(i)][column_of(j)] = found.p;
                tiles[3][row_of(i)][column_of(j)] = found.d_s;
            }
        weigh(of_v, first == 0, ones, tiles[2], tiles[1], d_other, width, left, slice);
        weigh(of_k, first == 0, ones, tiles[3], tiles[1], q, wide, left, slice);
    }
    T *to = d_qkv + part.qkv + width + part.first * wide;
    store(of_k, scales, to, wide, part.left, slice, adds);
    store(of_v, ones, to + width, wide, part.left, slice, adds);
}

/// A warp's row is a token of a head, in the order of [N, T, heads].
template <class T>
__device__ __forceinline__ void dots_of(const T *o, const T *d_o, float *dots, const Attention &sizes, uint64_t rows) {
    const uint64_t row = uint64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows)
        return;
    const int lane = threadIdx.x % 32, channels = sizes.channels;
    const uint64_t head = row % sizes.heads, token = row / sizes.heads % sizes.tokens, image = row / sizes.heads / sizes.tokens;
    o += row * channels, d_o += row * channels;
    float sum = 0.0f;
    constexpr int SIZE = Pack<T>::SIZE;
    if (channels % SIZE == 0) {
        for (int channel = lane * SIZE; channel < channels; channel += 32 * SIZE) {
            const Pack<T> a = Pack<T>::load(o + channel), b = Pack<T>::load(d_o + channel);
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                sum = __fmaf_rn(a.values[i], b.values[i], sum);
        }
    } else {
        for (int channel = lane; channel < channels; channel += 32)
            sum = __fmaf_rn(widened(o[channel]), widened(d_o[channel]), sum);
    }
    sum = sum_of(sum);
    if (lane == 0)
        dots[(image * sizes.heads + head) * sizes.tokens + token] = sum;
}

} // namespace

#define ATTENTION(T, SUFFIX)                                                                                                               \
    KERNEL(THREADS, attention_##SUFFIX, const T *qkv, T *o, float *log_sums, Attention sizes, float scale) {                               \
        forward(qkv, o, log_sums, sizes, scale);                                                                                           \
    }                                                                                                                                      \
    KERNEL(THREADS, attention_dots_##SUFFIX, const T *o, const T *d_o, float *dots, Attention sizes, uint64_t rows) {                      \
        dots_of(o, d_o, dots, sizes, rows);                                                                                                \
    }                                                                                                                                      \
    KERNEL(THREADS, attention_dq_##SUFFIX, const T *qkv, const float *log_sums, const T *d_o, const float *dots, T *d_qkv,                 \
           Attention sizes, float scale, uint32_t adds) {                                                                                  \
        gradient_of_q(qkv, log_sums, d_o, dots, d_qkv, sizes, scale, adds != 0);                                                           \
    }                                                                                                                                      \
    KERNEL(THREADS, attention_dkv_##SUFFIX, const T *qkv, const float *log_sums, const T *d_o, const float *dots, T *d_qkv,                \
           Attention sizes, float scale, uint32_t adds) {                                                                                  \
        gradient_of_k_and_v(qkv, log_sums, d_o, dots, d_qkv, sizes, scale, adds != 0);                                                     \
    }

ATTENTION(float, f32)
ATTENTION(bf16, bf16)
#undef ATTENTION
