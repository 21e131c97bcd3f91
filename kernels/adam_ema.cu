// Clipping, Adam or AdamW, the average of the weights and their bf16 copy, in one pass over flat buffers (src/ops/adam_ema).
//
//   gradients, weights, moment1, moment2, ema   f32 [n]; the last four are updated in place
//   copy      bf16 [n] =, the weights rounded; null: none
//   norm      f32 [2], L2 norm of the gradients, and 0 if one is not finite: then nothing is written
//   scalars   f32 [16], `Hyper::to_array`: lr, 1-beta1, 1-beta2, eps, weight_decay, bc1, bc2, max_grad_norm, 1-decay
//
// n is a multiple of 8, the buffers are aligned to 16 bytes. The bits are those of the CPU. A warp has 256 parameters, a lane four of each
// half of them: all accesses have 16 bytes, those of a warp stand side by side. Moves 36 n bytes, 38 n with the copy.

#include "pack.cuh"

namespace {

constexpr int THREADS = 256, WARP = 32;
/// Parameters that a warp reads at once.
constexpr uint32_t HALF = 4 * WARP;
constexpr float LARGEST = 3.4028234663852886e38f;

/// Factors that are the same for all parameters; names as in cpu.rs.
struct Update {
    float clip, l2, decay, rate1, rate2, root, eps, step, ema_rate;
};

/// In f64, once a block.
__device__ __forceinline__ Update update_of(const float *norm, const float *scalars, bool decoupled) {
    const double lr = scalars[0], weight_decay = scalars[4], max_grad_norm = scalars[7];
    double clip = 1.0;
    if (max_grad_norm > 0.0)
        clip = fmin(max_grad_norm / (double(norm[0]) + 1e-6), 1.0);
    Update u;
    u.clip = float(clip);
    u.l2 = decoupled ? 0.0f : float(weight_decay);
    u.decay = decoupled ? float(lr * weight_decay) : 0.0f;
    u.rate1 = scalars[1], u.rate2 = scalars[2];
    u.root = float(1.0 / sqrt(double(scalars[6])));
    u.eps = scalars[3];
    u.step = float(lr / double(scalars[5]));
    u.ema_rate = scalars[8];
    return u;
}

__device__ __forceinline__ void apply(float &weight, float &moment1, float &moment2, float &ema, float gradient, const Update &u) {
    float w = weight;
    float g = __fadd_rn(__fmul_rn(u.clip, gradient), __fmul_rn(u.l2, w));
    float m = __fadd_rn(moment1, __fmul_rn(u.rate1, __fsub_rn(g, moment1)));
    // A square past f32 must not make v infinite for good.
    float v = __fadd_rn(moment2, __fmul_rn(u.rate2, __fsub_rn(fminf(__fmul_rn(g, g), LARGEST), moment2)));
    float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(v), u.root), u.eps);
    float taken = __fadd_rn(__fmul_rn(u.decay, w), __fdiv_rn(__fmul_rn(u.step, m), denominator));
    moment1 = m;
    moment2 = v;
    weight = __fsub_rn(w, taken);
    ema = __fadd_rn(ema, __fmul_rn(u.ema_rate, __fsub_rn(weight, ema)));
}

using Four = Pack<float>;

/// Rounds what a lane has of its warp's parameters from `first` on. Neighbours swap, so that the even one has eight of the first half, and
/// the odd one of the second.
__device__ __forceinline__ void store_copy(bf16 *copy, const Four (&w)[2], uint64_t first, uint32_t lane, uint64_t n) {
    uint2 words[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Four &four = w[half];
        words[half] = Pack<bf16, 4>{{four.values[0], four.values[1], four.values[2], four.values[3]}}.word();
    }
    const bool is_odd = lane % 2 == 1;
    const uint2 own = is_odd ? words[1] : words[0], given = is_odd ? words[0] : words[1];
    const uint2 got = make_uint2(__shfl_xor_sync(~0u, given.x, 1), __shfl_xor_sync(~0u, given.y, 1));
    const uint64_t i = first + (is_odd ? HALF : 0) + 8 * (lane / 2);
    if (i < n)
        *reinterpret_cast<uint4 *>(copy + i) = is_odd ? make_uint4(got.x, got.y, own.x, own.y) : make_uint4(own.x, own.y, got.x, got.y);
}

} // namespace

KERNEL(THREADS, adam_ema, const float *gradients, const float *norm, const float *scalars, float *weights, float *moment1, float *moment2,
       float *ema, bf16 *copy, uint64_t n, uint32_t decoupled) {
    if (norm[1] == 0.0f)
        return;
    SHARED(Update, shared, 1);
    if (threadIdx.x == 0)
        shared[0] = update_of(norm, scalars, decoupled != 0);
    __syncthreads();
    const Update u = shared[0];
    const uint32_t lane = threadIdx.x % WARP;
    const uint64_t first = 2 * HALF * (uint64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP);
    Four g[2] = {}, w[2] = {}, m[2] = {}, v[2] = {}, e[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint64_t i = first + HALF * half + 4 * lane;
        if (i < n) {
            g[half] = Four::load(gradients + i), w[half] = Four::load(weights + i), e[half] = Four::load(ema + i);
            m[half] = Four::load(moment1 + i), v[half] = Four::load(moment2 + i);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint64_t i = first + HALF * half + 4 * lane;
#pragma unroll
        for (int k = 0; k < 4; k++)
            apply(w[half].values[k], m[half].values[k], v[half].values[k], e[half].values[k], g[half].values[k], u);
        if (i < n)
            w[half].store(weights + i), m[half].store(moment1 + i), v[half].store(moment2 + i), e[half].store(ema + i);
    }
    if (copy)
        store_copy(copy, w, first, lane, n);
}
