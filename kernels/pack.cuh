// Activations as f32 or bf16, read and written 16 bytes at a time; arithmetic is f32.
#pragma once

#include "cuda.cuh"

using bf16 = __nv_bfloat16;

template <class T> __device__ __forceinline__ T rounded(float value);
template <> __device__ __forceinline__ float rounded<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 rounded<bf16>(float value) { return __float2bfloat16_rn(value); }
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(bf16 value) { return __bfloat162float(value); }

/// As many neighbours as 16 bytes hold: 4 of f32, 8 of bf16.
template <class T> struct Pack {
    static constexpr int SIZE = 16 / sizeof(T);
    float values[SIZE];

    /// From an address that 16 divides.
    __device__ __forceinline__ static Pack load(const T *from) {
        Raw raw;
        raw.word = *reinterpret_cast<const uint4 *>(from);
        Pack pack;
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            pack.values[i] = widened(raw.elements[i]);
        return pack;
    }

    /// To such an address.
    __device__ __forceinline__ void store(T *to) const {
        Raw raw;
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            raw.elements[i] = rounded<T>(values[i]);
        *reinterpret_cast<uint4 *>(to) = raw.word;
    }

  private:
    union Raw {
        uint4 word;
        T elements[SIZE];
        __device__ Raw() {}
    };
};
