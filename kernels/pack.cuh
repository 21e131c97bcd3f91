// Activations as f32 or bf16, read and written 16 bytes at a time; arithmetic is f32.
#pragma once

#include "cuda.cuh"

using bf16 = __nv_bfloat16;

template <class T> __device__ __forceinline__ T rounded(float value);
template <> __device__ __forceinline__ float rounded<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 rounded<bf16>(float value) { return __float2bfloat16_rn(value); }
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(bf16 value) { return __bfloat162float(value); }

/// So many bytes, read or written at once.
template <int BYTES> struct WordOf;
template <> struct WordOf<16> { using Type = uint4; };
template <> struct WordOf<8> { using Type = uint2; };
template <> struct WordOf<4> { using Type = uint32_t; };
template <> struct WordOf<2> { using Type = uint16_t; };

/// Neighbours: as many as 16 bytes hold, 4 of f32 or 8 of bf16, or fewer.
template <class T, int COUNT = 16 / sizeof(T)> struct Pack {
    static constexpr int SIZE = COUNT;
    /// The neighbours as memory holds them.
    using Word = typename WordOf<SIZE * sizeof(T)>::Type;
    float values[SIZE];

    __device__ __forceinline__ static Pack of(Word word) {
        Raw raw;
        raw.word = word;
        Pack pack;
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            pack.values[i] = widened(raw.elements[i]);
        return pack;
    }

    __device__ __forceinline__ Word word() const {
        Raw raw;
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            raw.elements[i] = rounded<T>(values[i]);
        return raw.word;
    }

    /// From an address that the size of a word divides.
    __device__ __forceinline__ static Word read(const T *from) { return *reinterpret_cast<const Word *>(from); }
    __device__ __forceinline__ static Pack load(const T *from) { return of(read(from)); }

    /// To such an address.
    __device__ __forceinline__ void store(T *to) const { *reinterpret_cast<Word *>(to) = word(); }

  private:
    union Raw {
        Word word;
        T elements[SIZE];
        __device__ Raw() {}
    };
};
