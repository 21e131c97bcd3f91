// Self-attention on tensor cores, o = softmax(q k'/sqrt d) v for each head of d channels (src/ops/attention), without a matrix of all
// scores in memory (Dao 2023, FlashAttention-2).
//
//   qkv        bf16 [N, T, 3C], q, k and v side by side; head h has channels h d ... of each. 8 divides d.
//   o          bf16 [N, T, C] =
//   log_sums   f32 [N, heads, T] =, ln sum_j e^(q_i k_j/sqrt d)
//   scale      1/sqrt d
//
// attention_SIZE_bf16 takes heads of up to SIZE channels, which it fills up with zeros. attention_tiles.cuh says how it cuts its work.
//
// Grid: tiles x heads x N. Computes 4 N T^2 C FLOPs. Moves 8 N T C bytes; what is read again for each tile comes from the second-level
// cache.

#include "attention_tiles.cuh"

namespace {

using namespace tiles;

constexpr float LN_2 = 0.6931471805599453f;

// src/ops/attention/cuda.rs has the same numbers.
template <int SIZE> struct Forward;
template <> struct Forward<32> : Tile<32, 64, 64, 4, 1> {};
template <> struct Forward<64> : Tile<64, 64, 64, 4, 1> {};
template <> struct Forward<128> : Tile<128, 64, 64, 2, 2> {};
template <> struct Forward<256> : Tile<256, 64, 64, 2, 2> {};
template <> struct Forward<512> : Tile<512, 64, 32, 4, 2> {};

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

} // namespace

#define ATTENTION(SIZE)                                                                                                                    \
    KERNEL(Forward<SIZE>::THREADS, attention_##SIZE##_bf16, const bf16 *qkv, bf16 *o, float *log_sums, Attention sizes, float scale) {     \
        forward<Forward<SIZE>>(qkv, o, log_sums, sizes, scale);                                                                            \
    }

ATTENTION(32)
ATTENTION(64)
ATTENTION(128)
ATTENTION(256)
ATTENTION(512)
#undef ATTENTION
