// Clipping, Adam or AdamW, the average of the weights and their bf16 copy, in one pass over flat buffers (src/ops/adam_ema).
//
//   gradients, weights, moment1, moment2, ema   f32 [n]; the last four are updated in place
//   copy      bf16 [n] =, the weights rounded; null: none
//   norm      f32 [2], L2 norm of the gradients, and 0 if one is not finite: then nothing is written
//   scalars   f32 [16], `Hyper::to_array`: lr, 1-beta1, 1-beta2, eps, weight_decay, bc1, bc2, max_grad_norm, 1-decay
//
// n is a multiple of 4, the buffers are aligned to 16 bytes. The bits are those of the CPU. Moves 36 n bytes, 38 n with the copy.

#include "pack.cuh"

namespace {

constexpr int THREADS = 256;
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
    const uint64_t i = 4 * (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i >= n)
        return;
    using Four = Pack<float>;
    Four w = Four::load(weights + i), m = Four::load(moment1 + i), v = Four::load(moment2 + i), e = Four::load(ema + i);
    const Four g = Four::load(gradients + i);
#pragma unroll
    for (int k = 0; k < 4; k++)
        apply(w.values[k], m.values[k], v.values[k], e.values[k], g.values[k], u);
    w.store(weights + i), m.store(moment1 + i), v.store(moment2 + i), e.store(ema + i);
    if (copy) {
        uint2 rounded_pairs;
        rounded_pairs.x = __bfloat16_as_ushort(rounded<bf16>(w.values[0])) | uint32_t(__bfloat16_as_ushort(rounded<bf16>(w.values[1]))) << 16;
        rounded_pairs.y = __bfloat16_as_ushort(rounded<bf16>(w.values[2])) | uint32_t(__bfloat16_as_ushort(rounded<bf16>(w.values[3]))) << 16;
        *reinterpret_cast<uint2 *>(copy + i) = rounded_pairs;
    }
}
