// Self-attention on tensor cores, o = softmax(q k'/sqrt d) v for each head of d channels, and its gradient (src/ops/attention), without a
// matrix of all scores in memory (Dao 2023, FlashAttention-2).
//
//   qkv        bf16 [N, T, 3C], q, k and v side by side; head h has channels h d ... of each. 8 divides d.
//   o          bf16 [N, T, C] =
//   log_sums   f32 [N, heads, T] =, ln sum_j e^(q_i k_j/sqrt d)
//   d_o        bf16 [N, T, C]
//   dots       f32 [N, heads, T] = of attention_dots: the sums of o d_o over a head's channels
//   d_qkv      bf16 [N, T, 3C] = or +=: attention_dq_* writes q's part, attention_dkv_* those of k and v
//   scale      1/sqrt d
//
// attention_SIZE_bf16 and its gradients take heads of up to SIZE channels, which they fill up with zeros. A block has a tile of queries (of
// keys for d_k and d_v) for itself and goes through the tiles of the others in order, so that equal inputs give equal bits; no two blocks
// write the same place. Scores and sums are f32; probabilities and their gradients are rounded to bf16 where they are factors of a product.
//
// A tile is copied while the product before it is computed: each kernel says which. Rows of tiles are 16 bytes longer than what they hold,
// so that eight of them begin in different banks.
//
// Grid: tiles x heads x N. Computes 4 N T^2 C FLOPs forward and 14 backward. Moves 8 N T C bytes forward and 26 backward; what is read
// again for each tile comes from the second-level cache.

#include "attention.cuh"
#include "copy_async.cuh"
#include "mma.cuh"

namespace {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

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

// src/ops/attention/cuda.rs has the same numbers.
template <int SIZE> struct Forward;
template <> struct Forward<32> : Tile<32, 64, 64, 4, 1> {};
template <> struct Forward<64> : Tile<64, 64, 64, 4, 1> {};
template <> struct Forward<128> : Tile<128, 64, 64, 2, 2> {};
template <> struct Forward<256> : Tile<256, 64, 64, 2, 2> {};
template <> struct Forward<512> : Tile<512, 64, 32, 4, 2> {};
template <int SIZE> struct Queries;
template <> struct Queries<32> : Tile<32, 64, 64, 2, 2> {};
template <> struct Queries<64> : Tile<64, 64, 64, 2, 2> {};
template <> struct Queries<128> : Tile<128, 64, 64, 2, 2> {};
template <> struct Queries<256> : Tile<256, 64, 64, 2, 4> {};
template <> struct Queries<512> : Tile<512, 32, 32, 2, 4> {};
template <int SIZE> struct Keys;
template <> struct Keys<32> : Tile<32, 64, 64, 2, 2> {};
template <> struct Keys<64> : Tile<64, 64, 64, 2, 2> {};
template <> struct Keys<128> : Tile<128, 64, 64, 2, 2> {};
template <> struct Keys<256> : Tile<256, 64, 64, 2, 4> {};
template <> struct Keys<512> : Tile<512, 32, 32, 2, 4> {};

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

/// The values of the four lanes that share a row, together.
template <class F> __device__ __forceinline__ float over_row(float value, F together) {
    value = together(value, __shfl_xor_sync(~0u, value, 1));
    return together(value, __shfl_xor_sync(~0u, value, 2));
}

/// v's tile is copied during q k', k's next one during p v.
template <class T>
__device__ __forceinline__ void forward(const bf16 *qkv, bf16 *o, float *log_sums, const Attention &sizes, float scale) {
    DYNAMIC_SHARED(shared);
    bf16 *q = reinterpret_cast<bf16 *>(shared), *k = q + T::OWN * T::PITCH, *v = k + T::OTHER * T::PITCH, *p = v + T::OTHER * T::PITCH;
    // Each row's value of each of the warps that share it.
    float *of_warps = reinterpret_cast<float *>(p + T::OWN * T::SCORE_PITCH);

    const Part part(sizes, T::OWN, blockIdx.x);
    const Position<T> at;
    const int tokens = sizes.tokens, channels = sizes.channels;
    const size_t wide = sizes.wide(), width = sizes.width();
    const bf16 *all_q = qkv + part.qkv, *all_k = all_q + width, *all_v = all_k + width;
    const float to_log2 = scale * LOG2_E;
    auto maximum = [](float a, float b) { return fmaxf(a, b); };
    auto sum = [](float a, float b) { return a + b; };

    begin_tile<T, T::OWN>(q, all_q + part.first * wide, wide, part.left, channels);
    begin_tile<T, T::OTHER>(k, all_k, wide, tokens, channels);
    commit_copies();
    typename T::Outputs acc = {};
    float maxima[T::M][2], sums[T::M][2];
#pragma unroll
    for (int m = 0; m < T::M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            maxima[m][half] = -INFINITY, sums[m][half] = 0.0f;

    for (int first = 0; first < tokens; first += T::OTHER) {
        wait_for_copies<0>();
        __syncthreads();
        begin_tile<T, T::OTHER>(v, all_v + first * wide, wide, tokens - first, channels);
        commit_copies();
        typename T::Scores s = {};
        score<T>(s, q, k, at);

        // In powers of 2; keys that are not there get nothing.
        float higher[T::M][2];
        const bool is_whole = first + T::OTHER <= tokens;
#pragma unroll
        for (int m = 0; m < T::M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float highest = -INFINITY;
#pragma unroll
                for (int n = 0; n < T::SCORES; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float &x = s[m][n][2 * half + i];
                        x = is_whole || first + at.score_column(n) + i < tokens ? x * to_log2 : -INFINITY;
                        highest = fmaxf(highest, x);
                    }
                highest = over_row(highest, maximum);
                if (T::ACROSS > 1 && at.lane % 4 == 0)
                    of_warps[at.across * T::OWN + at.row(m, half)] = highest;
                higher[m][half] = fmaxf(maxima[m][half], highest);
            }
        __syncthreads();
        if (first + T::OTHER < tokens)
            begin_tile<T, T::OTHER>(k, all_k + (first + T::OTHER) * wide, wide, tokens - first - T::OTHER, channels);
        commit_copies();

#pragma unroll
        for (int m = 0; m < T::M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int warp = 0; warp < T::ACROSS && T::ACROSS > 1; warp++)
                    higher[m][half] = fmaxf(higher[m][half], of_warps[warp * T::OWN + at.row(m, half)]);
                const float before = exp2_of(maxima[m][half] - higher[m][half]);
                maxima[m][half] = higher[m][half];
                sums[m][half] *= before;
#pragma unroll
                for (int n = 0; n < T::OUTPUTS; n++)
                    acc[m][n][2 * half] *= before, acc[m][n][2 * half + 1] *= before;
#pragma unroll
                for (int n = 0; n < T::SCORES; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float &x = s[m][n][2 * half + i];
                        x = exp2_of(x - higher[m][half]);
                        sums[m][half] += x;
                    }
            }
        round_to<T>(p, s, at);
        wait_for_copies<1>();
        __syncthreads();
        weigh<T>(acc, p, v, at);
    }

    float factors[T::M][2];
#pragma unroll
    for (int m = 0; m < T::M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sums[m][half] = over_row(sums[m][half], sum);
            if (T::ACROSS > 1 && at.lane % 4 == 0)
                of_warps[at.across * T::OWN + at.row(m, half)] = sums[m][half];
        }
    if (T::ACROSS > 1)
        __syncthreads();
#pragma unroll
    for (int m = 0; m < T::M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = T::ACROSS > 1 ? 0.0f : sums[m][half];
#pragma unroll
            for (int warp = 0; warp < T::ACROSS && T::ACROSS > 1; warp++)
                total += of_warps[warp * T::OWN + at.row(m, half)];
            factors[m][half] = 1.0f / total;
            if (at.across == 0 && at.lane % 4 == 0 && at.row(m, half) < part.left)
                log_sums[part.row + part.first + at.row(m, half)] = (maxima[m][half] + log2f(total)) * LN_2;
        }
    store<T>(acc, factors, q, o + part.o + part.first * width, width, part.left, channels, false, at);
}

/// d_q = d_s k/sqrt d, with d_s = p (d_o v' - dots) and p = e^(s - log_sum). k's tile is copied during d_o v', v's next one during what
/// follows.
template <class T>
__device__ __forceinline__ void gradient_of_q(const bf16 *qkv, const float *log_sums, const bf16 *d_o, const float *dots, bf16 *d_qkv,
                                              const Attention &sizes, float scale, bool adds) {
    DYNAMIC_SHARED(shared);
    bf16 *q = reinterpret_cast<bf16 *>(shared), *d_own = q + T::OWN * T::PITCH, *k = d_own + T::OWN * T::PITCH;
    bf16 *v = k + T::OTHER * T::PITCH, *d_scores = v + T::OTHER * T::PITCH;

    const Part part(sizes, T::OWN, blockIdx.x);
    const Position<T> at;
    const int tokens = sizes.tokens, channels = sizes.channels;
    const size_t wide = sizes.wide(), width = sizes.width();
    const bf16 *all_q = qkv + part.qkv, *all_k = all_q + width, *all_v = all_k + width;
    const float to_log2 = scale * LOG2_E;

    begin_tile<T, T::OWN>(q, all_q + part.first * wide, wide, part.left, channels);
    begin_tile<T, T::OWN>(d_own, d_o + part.o + part.first * width, width, part.left, channels);
    begin_tile<T, T::OTHER>(v, all_v, wide, tokens, channels);
    commit_copies();
    float logs[T::M][2], dot[T::M][2], factors[T::M][2];
#pragma unroll
    for (int m = 0; m < T::M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = at.row(m, half);
            logs[m][half] = row < part.left ? log_sums[part.row + part.first + row] * LOG2_E : INFINITY;
            dot[m][half] = row < part.left ? dots[part.row + part.first + row] : 0.0f;
            factors[m][half] = scale;
        }
    typename T::Outputs acc = {};

    for (int first = 0; first < tokens; first += T::OTHER) {
        wait_for_copies<0>();
        __syncthreads();
        begin_tile<T, T::OTHER>(k, all_k + first * wide, wide, tokens - first, channels);
        commit_copies();
        typename T::Scores s = {}, d_s = {};
        score<T>(d_s, d_own, v, at);
        wait_for_copies<0>();
        __syncthreads();
        if (first + T::OTHER < tokens)
            begin_tile<T, T::OTHER>(v, all_v + (first + T::OTHER) * wide, wide, tokens - first - T::OTHER, channels);
        commit_copies();
        score<T>(s, q, k, at);

        const bool is_whole = first + T::OTHER <= tokens;
#pragma unroll
        for (int m = 0; m < T::M; m++)
#pragma unroll
            for (int n = 0; n < T::SCORES; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float p = exp2_of(s[m][n][i] * to_log2 - logs[m][i / 2]);
                    // A key that is not there is 0, but its p may be past f32.
                    const bool is_there = is_whole || first + at.score_column(n) + i % 2 < tokens;
                    d_s[m][n][i] = is_there ? p * (d_s[m][n][i] - dot[m][i / 2]) : 0.0f;
                }
        round_to<T>(d_scores, d_s, at);
        __syncthreads();
        weigh<T>(acc, d_scores, k, at);
    }
    store<T>(acc, factors, q, d_qkv + part.qkv + part.first * wide, wide, part.left, channels, adds, at);
}

/// d_v = p' d_o and d_k = d_s' q/sqrt d; rows are keys here. q's tile is copied during v d_o', that of the next d_o during d_s' q.
template <class T>
__device__ __forceinline__ void gradient_of_k_and_v(const bf16 *qkv, const float *log_sums, const bf16 *d_o, const float *dots, bf16 *d_qkv,
                                                    const Attention &sizes, float scale, bool adds) {
    DYNAMIC_SHARED(shared);
    bf16 *k = reinterpret_cast<bf16 *>(shared), *v = k + T::OWN * T::PITCH, *q = v + T::OWN * T::PITCH;
    bf16 *d_other = q + T::OTHER * T::PITCH, *scores = d_other + T::OTHER * T::PITCH, *d_scores = scores + T::OWN * T::SCORE_PITCH;
    // Of each query of the tile.
    float *logs = reinterpret_cast<float *>(d_scores + T::OWN * T::SCORE_PITCH), *dot = logs + T::OTHER;

    const Part part(sizes, T::OWN, blockIdx.x);
    const Position<T> at;
    const int tokens = sizes.tokens, channels = sizes.channels;
    const size_t wide = sizes.wide(), width = sizes.width();
    const bf16 *all_q = qkv + part.qkv, *all_k = all_q + width, *all_v = all_k + width, *all_d_o = d_o + part.o;
    const float to_log2 = scale * LOG2_E;

    begin_tile<T, T::OWN>(k, all_k + part.first * wide, wide, part.left, channels);
    begin_tile<T, T::OWN>(v, all_v + part.first * wide, wide, part.left, channels);
    begin_tile<T, T::OTHER>(d_other, all_d_o, width, tokens, channels);
    commit_copies();
    typename T::Outputs of_k = {}, of_v = {};

    for (int first = 0; first < tokens; first += T::OTHER) {
        wait_for_copies<0>();
        __syncthreads();
        begin_tile<T, T::OTHER>(q, all_q + first * wide, wide, tokens - first, channels);
        commit_copies();
        // A thread's query: one that is not there has no probabilities.
        const int query = first + threadIdx.x;
        const bool is_there = threadIdx.x < T::OTHER && query < tokens;
        const float log_of = is_there ? log_sums[part.row + query] * LOG2_E : INFINITY, dot_of = is_there ? dots[part.row + query] : 0.0f;
        typename T::Scores s = {}, d_s = {};
        score<T>(d_s, v, d_other, at);
        if (threadIdx.x < T::OTHER)
            logs[threadIdx.x] = log_of, dot[threadIdx.x] = dot_of;
        wait_for_copies<0>();
        __syncthreads();
        score<T>(s, k, q, at);
#pragma unroll
        for (int m = 0; m < T::M; m++)
#pragma unroll
            for (int n = 0; n < T::SCORES; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = at.score_column(n) + i % 2;
                    s[m][n][i] = exp2_of(s[m][n][i] * to_log2 - logs[column]);
                    d_s[m][n][i] = s[m][n][i] * (d_s[m][n][i] - dot[column]);
                }
        round_to<T>(scores, s, at);
        round_to<T>(d_scores, d_s, at);
        __syncthreads();
        weigh<T>(of_v, scores, d_other, at);
        __syncthreads();
        if (first + T::OTHER < tokens)
            begin_tile<T, T::OTHER>(d_other, all_d_o + (first + T::OTHER) * width, width, tokens - first - T::OTHER, channels);
        commit_copies();
        weigh<T>(of_k, d_scores, q, at);
    }

    float scales[T::M][2], ones[T::M][2];
#pragma unroll
    for (int m = 0; m < T::M; m++)
        scales[m][0] = scales[m][1] = scale, ones[m][0] = ones[m][1] = 1.0f;
    bf16 *to = d_qkv + part.qkv + width + part.first * wide;
    store<T>(of_k, scales, k, to, wide, part.left, channels, adds, at);
    store<T>(of_v, ones, v, to + width, wide, part.left, channels, adds, at);
}

} // namespace

#define ATTENTION(SIZE)                                                                                                                    \
    KERNEL(Forward<SIZE>::THREADS, attention_##SIZE##_bf16, const bf16 *qkv, bf16 *o, float *log_sums, Attention sizes, float scale) {     \
        forward<Forward<SIZE>>(qkv, o, log_sums, sizes, scale);                                                                            \
    }                                                                                                                                      \
    KERNEL(Queries<SIZE>::THREADS, attention_dq_##SIZE##_bf16, const bf16 *qkv, const float *log_sums, const bf16 *d_o, const float *dots, \
           bf16 *d_qkv, Attention sizes, float scale, uint32_t adds) {                                                                     \
        gradient_of_q<Queries<SIZE>>(qkv, log_sums, d_o, dots, d_qkv, sizes, scale, adds != 0);                                            \
    }                                                                                                                                      \
    KERNEL(Keys<SIZE>::THREADS, attention_dkv_##SIZE##_bf16, const bf16 *qkv, const float *log_sums, const bf16 *d_o, const float *dots,   \
           bf16 *d_qkv, Attention sizes, float scale, uint32_t adds) {                                                                     \
        gradient_of_k_and_v<Keys<SIZE>>(qkv, log_sums, d_o, dots, d_qkv, sizes, scale, adds != 0);                                         \
    }

ATTENTION(32)
ATTENTION(64)
ATTENTION(128)
ATTENTION(256)
ATTENTION(512)
#undef ATTENTION
