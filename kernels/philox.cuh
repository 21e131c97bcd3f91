// Random numbers without a state (src/rng): Philox4x32-10 of Salmon, Moraes, Dror, Shaw 2011, and Box-Muller normals on polynomials.
//
// Every operation is written out with its rounding, so that the bits are those that the CPU draws: the compiler may contract a product and a
// sum only where `__fmaf_rn` says so. The coefficients are derived in src/rng/box_muller_coefficients.py and must stay those of
// src/rng/normal.rs.
#pragma once

#include "cuda.cuh"

namespace rng {

/// What numbers are drawn for; `Kind` of src/rng. Never renumber.
enum Kind : uint32_t { TIMESTEP = 0, NOISE = 1, FLIP = 2, DROPOUT = 3, INIT = 4, SAMPLE = 5, SAMPLE_NOISE = 6, ORDER = 7 };

/// One stream: key = run seed, counter = (element/4, sample, step, kind·2^24 + layer).
struct Stream {
    uint2 key;
    uint32_t sample, step, purpose;
};

__device__ __forceinline__ Stream stream(uint64_t seed, Kind kind, uint32_t layer, uint32_t sample, uint32_t step) {
    return {make_uint2(uint32_t(seed), uint32_t(seed >> 32)), sample, step, uint32_t(kind) << 24 | layer};
}

/// The four random words of elements 4·group to 4·group + 3.
__device__ __forceinline__ uint4 words(const Stream &s, uint32_t group) {
    uint4 c = make_uint4(group, s.sample, s.step, s.purpose);
    uint2 k = s.key;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint32_t high0 = __umulhi(c.x, 0xD2511F53u), low0 = c.x * 0xD2511F53u;
        uint32_t high1 = __umulhi(c.z, 0xCD9E8D57u), low1 = c.z * 0xCD9E8D57u;
        c = make_uint4(high1 ^ c.y ^ k.x, low1, high0 ^ c.w ^ k.y, low0);
        k.x += 0x9E3779B9u;
        k.y += 0xBB67AE85u;
    }
    return c;
}

/// The random word of element 0.
__device__ __forceinline__ uint32_t first_word(const Stream &s) { return words(s, 0).x; }

/// -2 ln u of u = (bits + 1/2)/2^32.
__device__ __forceinline__ float radius_squared(uint32_t bits) {
    float scaled = __fadd_rn(__uint2float_rn(bits), 0.5f);
    // 2^32 u = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)): cut out of the float's own bits.
    uint32_t shifted = __float_as_uint(scaled) + (0x3F800000u - 0x3F3504F3u);
    int exponent = int(shifted >> 23) - (127 + 32);
    float f = __fadd_rn(__uint_as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u), -1.0f);
    float p = -0.07636439f;
    p = __fmaf_rn(p, f, 0.12762217f);
    p = __fmaf_rn(p, f, -0.1315961f);
    p = __fmaf_rn(p, f, 0.1420158f);
    p = __fmaf_rn(p, f, -0.16623409f);
    p = __fmaf_rn(p, f, 0.20001242f);
    p = __fmaf_rn(p, f, -0.2500082f);
    p = __fmaf_rn(p, f, 0.3333333f);
    p = __fmaf_rn(p, f, -0.5f);
    float ln_mantissa = __fmaf_rn(__fmul_rn(f, f), p, f);
    return __fmul_rn(__fmaf_rn(__int2float_rn(exponent), 0.6931472f, ln_mantissa), -2.0f);
}

/// (cos, sin) of 2 pi bits/2^32: x and y.
__device__ __forceinline__ float2 cos_sin(uint32_t bits) {
    // The nearest quarter turn, and what is left of it: z in [-1/2, 1/2) quarter turns.
    uint32_t quadrant = (bits + (1u << 29)) >> 30;
    float z = __fmul_rn(__int2float_rn(int(bits - (quadrant << 30))), 1.0f / (1u << 30));
    float zz = __fmul_rn(z, z);
    float s = -0.0046859714f;
    s = __fmaf_rn(s, zz, 0.079712525f);
    s = __fmaf_rn(s, zz, -0.64596665f);
    s = __fmaf_rn(s, zz, 1.5707964f);
    s = __fmul_rn(s, z);
    float c = 0.00089446054f;
    c = __fmaf_rn(c, zz, -0.020855593f);
    c = __fmaf_rn(c, zz, 0.25366855f);
    c = __fmaf_rn(c, zz, -1.2337005f);
    c = __fmaf_rn(c, zz, 1.0f);
    // Quadrants 0 to 3 turn (c, s) into (c, s), (-s, c), (-c, -s), (s, -c).
    bool is_odd = quadrant & 1;
    uint32_t cos_bits = __float_as_uint(is_odd ? s : c) ^ ((quadrant + 1) << 30 & 0x80000000u);
    uint32_t sin_bits = __float_as_uint(is_odd ? c : s) ^ (quadrant << 30 & 0x80000000u);
    return make_float2(__uint_as_float(cos_bits), __uint_as_float(sin_bits));
}

/// Standard normals of elements 4·group to 4·group + 3.
__device__ __forceinline__ float4 normals(const Stream &s, uint32_t group) {
    uint4 w = words(s, group);
    float r0 = __fsqrt_rn(radius_squared(w.x)), r1 = __fsqrt_rn(radius_squared(w.z));
    float2 a0 = cos_sin(w.y), a1 = cos_sin(w.w);
    return make_float4(__fmul_rn(r0, a0.x), __fmul_rn(r0, a0.y), __fmul_rn(r1, a1.x), __fmul_rn(r1, a1.y));
}

} // namespace rng
