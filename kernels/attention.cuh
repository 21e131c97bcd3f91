// Where the tensors of an attention are, for its kernels with and without tensor cores.
#pragma once

#include "pack.cuh"

/// Tokens of an image, its heads, and the channels of a head: C = heads * channels.
struct Attention {
    uint32_t tokens, heads, channels;

    __device__ __forceinline__ size_t width() const { return static_cast<size_t>(heads) * channels; }
    __device__ __forceinline__ size_t wide() const { return 3 * width(); }
};

/// What a block works on: a tile of the tokens of one head of one image. Blocks of an image stand side by side.
struct Part {
    /// The head's first elements in [N, T, 3C], [N, T, C] and [N, heads, T].
    size_t qkv, o, row;
    /// The tile's first token, and how many there are from it on.
    uint32_t first;
    int left;

    __device__ __forceinline__ Part(const Attention &sizes, uint32_t tile, uint32_t block) {
        const uint32_t tiles = (sizes.tokens + tile - 1) / tile;
        const uint32_t index = block / tiles, head = index % sizes.heads;
        const size_t image = index / sizes.heads;
        qkv = image * sizes.tokens * sizes.wide() + static_cast<size_t>(head) * sizes.channels;
        o = image * sizes.tokens * sizes.width() + static_cast<size_t>(head) * sizes.channels;
        row = static_cast<size_t>(index) * sizes.tokens;
        first = block % tiles * tile;
        left = static_cast<int>(sizes.tokens - first);
    }
};
