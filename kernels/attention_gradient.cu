// The gradient of attention.cu.
//
//   qkv        bf16 [N, T, 3C], as there
//   log_sums   f32 [N, heads, T], as attention.cu gives them
//   d_o        bf16 [N, T, C]
//   dots       f32 [N, heads, T] = of attention_dots: the sums of o d_o over a head's channels
//   d_qkv      bf16 [N, T, 3C] = or +=: attention_dq_* writes q's part, attention_dkv_* those of k and v
//   scale      1/sqrt d
//
// attention_dq_SIZE_bf16 and attention_dkv_SIZE_bf16 take heads of up to SIZE channels, which they fill up with zeros. attention_tiles.cuh
// says how they cut their work.
//
// Grid: tiles x heads x N. Computes 14 N T^2 C FLOPs. Moves 26 N T C bytes; what is read again for each tile comes from the second-level
// cache.

#include "attention_tiles.cuh"

namespace {

using namespace tiles;

// src/ops/attention/cuda.rs has the same numbers.
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

#define ATTENTION_GRADIENT(SIZE)                                                                                                           \
    KERNEL(Queries<SIZE>::THREADS, attention_dq_##SIZE##_bf16, const bf16 *qkv, const float *log_sums, const bf16 *d_o, const float *dots, \
           bf16 *d_qkv, Attention sizes, float scale, uint32_t adds) {                                                                     \
        gradient_of_q<Queries<SIZE>>(qkv, log_sums, d_o, dots, d_qkv, sizes, scale, adds != 0);                                            \
    }                                                                                                                                      \
    KERNEL(Keys<SIZE>::THREADS, attention_dkv_##SIZE##_bf16, const bf16 *qkv, const float *log_sums, const bf16 *d_o, const float *dots,   \
           bf16 *d_qkv, Attention sizes, float scale, uint32_t adds) {                                                                     \
        gradient_of_k_and_v<Keys<SIZE>>(qkv, log_sums, d_o, dots, d_qkv, sizes, scale, adds != 0);                                         \
    }

ATTENTION_GRADIENT(32)
ATTENTION_GRADIENT(64)
ATTENTION_GRADIENT(128)
ATTENTION_GRADIENT(256)
ATTENTION_GRADIENT(512)
#undef ATTENTION_GRADIENT
