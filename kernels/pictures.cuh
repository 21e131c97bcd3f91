// The pictures of a training batch, as q_sample and the loss read them.
#pragma once

#include "philox.cuh"

/// Sizes of a picture, and the channels that its activations have.
struct Image {
    int height, width, channels, padded;

    __device__ __forceinline__ size_t area() const { return static_cast<size_t>(height) * width; }
};

/// Whether the picture at place `sample` of the global batch is mirrored left to right.
__device__ __forceinline__ bool mirrored(bool flip, uint64_t seed, uint32_t sample, uint32_t step) {
    return flip && rng::first_word(rng::stream(seed, rng::FLIP, 0, sample, step)) >> 31;
}

/// The pixel that is read for the one at `pixel`.
__device__ __forceinline__ size_t source(const Image &image, size_t pixel, bool is_mirrored) {
    const size_t row = pixel / image.width, column = pixel % image.width;
    return is_mirrored ? row * image.width + image.width - 1 - column : pixel;
}

/// x_0 = (2 pixel - 255)/255: the dividend is exact, so there is one rounding.
__device__ __forceinline__ float x_0_of(uint8_t pixel) {
    return __fdiv_rn(__fadd_rn(__fmul_rn(2.0f, __uint2float_rn(pixel)), -255.0f), 255.0f);
}
