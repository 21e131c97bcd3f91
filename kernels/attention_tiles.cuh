// What attention.cu and attention_gradient.cu do alike, on tensor cores.
//
// A block has a tile of queries (of keys for d_k and d_v) for itself and goes through the tiles of the others in order, so that equal
// inputs give equal bits; no two blocks write the same place. Scores and sums are f32; probabilities and their gradients are rounded to
// bf16 where they are factors of a product.
//
// A tile is copied while the product before it is computed: each kernel says which. Rows of tiles are 16 bytes longer than what they hold,
// so that eight of them begin in different banks.
#pragma once

#include "attention.cuh"
#include "copy_async.cuh"
#include "mma.cuh"

namespace tiles {

constexpr float LOG2_E = 1.4426950408889634f;

/// How a kernel cuts its work: a block's tile has OWN rows of D channels and meets tiles of OTHER rows. Of the scores and of the output a
/// warp has M times 16 rows, and ACROSS warps share the columns of each.
template <int D_, int OWN_, int OTHER_, int DOWN_, int ACROSS_> struct Tile {
    static constexpr int D = D_, OWN = OWN_, OTHER = OTHER_, DOWN = DOWN_, ACROSS = ACROSS_;
    static constexpr int THREADS = 32 * DOWN * ACROSS;
    static constexpr int M = OWN / DOWN / 16, SCORES = OTHER / ACROSS / 8, OUTPUTS = D / ACROSS / 8;
    static constexpr int PITCH = D + 8, SCORE_PITCH = OTHER + 8;
    static_assert(M * DOWN * 16 == OWN && SCORES * ACROSS * 8 == OTHER && OUTPUTS * ACROSS * 8 == D);
    static_assert(OUTPUTS % 2 == 0 && THREADS >= OTHER);
    using Scores = float[M][SCORES][4];
    using Outputs = float[M][OUTPUTS][4];
};

/// Where a thread's accumulators stand: those of mma::multiply [m][n] have rows row(m, 0) and row(m, 1) and two columns from column(n) on.
template <class T> struct Position {
    int down = threadIdx.x / 32 / T::ACROSS, across = threadIdx.x / 32 % T::ACROSS, lane = threadIdx.x % 32;

    /// The warp's first row.
    __device__ __forceinline__ int rows() const { return down * T::M * 16; }
    __device__ __forceinline__ int row(int m, int half) const { return rows() + m * 16 + half * 8 + lane / 4; }
    /// The warp's first column of the scores.
    __device__ __forceinline__ int score_columns() const { return across * T::SCORES * 8; }
    __device__ __forceinline__ int score_column(int n) const { return score_columns() + n * 8 + lane % 4 * 2; }
    __device__ __forceinline__ int output_columns() const { return across * T::OUTPUTS * 8; }
    __device__ __forceinline__ int output_column(int n) const { return output_columns() + n * 8 + lane % 4 * 2; }
};

/// 2^x, or 0 where that is below 2^-126.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDACC__
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    return sim::exp2_approx(x);
#endif
}

/// Begins to copy a head's channels of ROWS tokens that stand `stride` apart; from `left` rows and `channels` channels on there are zeros.
template <class T, int ROWS>
__device__ __forceinline__ void begin_tile(bf16 *tile, const bf16 *from, size_t stride, int left, int channels) {
    constexpr int PACKS = T::D / 8, STEP = T::THREADS / PACKS;
    static_assert(T::THREADS % PACKS == 0 && ROWS % STEP == 0);
    const int channel = threadIdx.x % PACKS * 8;
    int row = threadIdx.x / PACKS;
    tile += row * T::PITCH + channel;
    from += row * stride + channel;
    // Not unrolled: addresses would take the registers of the sums.
#pragma unroll 1
    for (; row < ROWS; row += STEP, tile += STEP * T::PITCH, from += STEP * stride)
        copy_async(reinterpret_cast<uint4 *>(tile), reinterpret_cast<const uint4 *>(from), row < left && channel < channels);
}

/// acc += a b': D channels of the warp's rows of two tiles.
template <class T> __device__ __forceinline__ void score(typename T::Scores &acc, const bf16 *a, const bf16 *b, const Position<T> &at) {
    // Two matrices of b at a time where there are two.
    constexpr int STEP = T::SCORES > 1 ? 2 : 1;
    a += (at.rows() + at.lane % 16) * T::PITCH + at.lane / 16 * 8;
    b += (at.score_columns() + at.lane / 16 * 8 * (STEP - 1) + at.lane % 8) * T::PITCH + at.lane / 8 % 2 * 8;
#pragma unroll 4
    for (int k = 0; k < T::D; k += 16) {
        uint32_t left[T::M][4];
#pragma unroll
        for (int m = 0; m < T::M; m++)
            mma::load(left[m], a + m * 16 * T::PITCH + k);
#pragma unroll
        for (int n = 0; n < T::SCORES; n += STEP) {
            uint32_t right[2 * STEP];
            mma::load(right, b + n * 8 * T::PITCH + k);
#pragma unroll
            for (int m = 0; m < T::M; m++)
#pragma unroll
                for (int i = 0; i < STEP; i++)
                    mma::multiply(acc[m][n + i], left[m], right + 2 * i);
        }
    }
}

/// acc += a b: the warp's rows of a matrix of probabilities, and the warp's channels of a tile.
template <class T> __device__ __forceinline__ void weigh(typename T::Outputs &acc, const bf16 *a, const bf16 *b, const Position<T> &at) {
    a += (at.rows() + at.lane % 16) * T::SCORE_PITCH + at.lane / 16 * 8;
    b += at.lane % 16 * T::PITCH + at.output_columns() + at.lane / 16 * 8;
#pragma unroll 2
    for (int k = 0; k < T::OTHER; k += 16) {
        uint32_t left[T::M][4];
#pragma unroll
        for (int m = 0; m < T::M; m++)
            mma::load(left[m], a + m * 16 * T::SCORE_PITCH + k);
#pragma unroll
        for (int n = 0; n < T::OUTPUTS; n += 2) {
            uint32_t right[4];
            mma::load_transposed(right, b + k * T::PITCH + n * 8);
#pragma unroll
            for (int m = 0; m < T::M; m++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    mma::multiply(acc[m][n + i], left[m], right + 2 * i);
        }
    }
}

/// Rounds the warp's part of a matrix to where `weigh` reads it.
template <class T> __device__ __forceinline__ void round_to(bf16 *to, const typename T::Scores &scores, const Position<T> &at) {
#pragma unroll
    for (int m = 0; m < T::M; m++)
#pragma unroll
        for (int n = 0; n < T::SCORES; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<uint32_t *>(to + at.row(m, half) * T::SCORE_PITCH + at.score_column(n)) =
                    mma::pair(scores[m][n][2 * half], scores[m][n][2 * half + 1]);
}

/// Writes or adds the block's sums, times a factor for each row of this thread, by way of a tile that nobody needs any more.
template <class T>
__device__ __forceinline__ void store(const typename T::Outputs &acc, const float (&factors)[T::M][2], bf16 *tile, bf16 *to, size_t stride,
                                      int left, int channels, bool adds, const Position<T> &at) {
#pragma unroll
    for (int m = 0; m < T::M; m++)
#pragma unroll
        for (int n = 0; n < T::OUTPUTS; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<uint32_t *>(tile + at.row(m, half) * T::PITCH + at.output_column(n)) =
                    mma::pair(acc[m][n][2 * half] * factors[m][half], acc[m][n][2 * half + 1] * factors[m][half]);
    __syncthreads();
    constexpr int PACKS = T::D / 8;
    for (int pack = threadIdx.x; pack < T::OWN * PACKS; pack += T::THREADS) {
        const int row = pack / PACKS, channel = pack % PACKS * 8;
        if (row >= left || channel >= channels)
            continue;
        bf16 *place = to + row * stride + channel;
        Pack<bf16> sum = Pack<bf16>::load(tile + row * T::PITCH + channel);
        if (adds) {
            const Pack<bf16> before = Pack<bf16>::load(place);
#pragma unroll
            for (int i = 0; i < 8; i++)
                sum.values[i] += before.values[i];
        }
        sum.store(place);
    }
}

} // namespace tiles
